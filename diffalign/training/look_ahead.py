"""What a loss must know of a whole optimiser step before any part of it is differentiated.

A mean over tokens, or a baseline that is a mean over the batch, is one of the whole step. So where
an objective says that it must know it, all micro-batches of a step are prepared first, and their
totals are added up over the ranks; where it must know the policy's log-ratios too, the policy runs
over all of them once without gradient. Everything that was computed is kept for the second visit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.models.base import AbstractTrainable
from diffalign.models.devices import send
from diffalign.objectives.base import Likelihoods, StepTotals, TokenLikelihoods


@dataclass
class MicroBatch:
    """A batch, and what is known of it already."""

    batch: Any
    prepared: Any = None
    """By the likelihood; None until it was."""
    reference: Mapping[str, Tensor] | None = None
    """The reference's values by view; None until they were computed."""
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    """What the likelihood adds to the log, once the policy was evaluated."""


def views_of(
    policy: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    row_metadata: Mapping[str, Mapping[str, Tensor]],
    totals: Mapping[str, StepTotals],
    strength: Mapping[str, Tensor] | None = None,
    tokens: Mapping[str, TokenLikelihoods] | None = None,
) -> dict[str, Likelihoods]:
    """The record of each view, as an objective takes it.

    Args:
        policy, reference: values by view; no reference's where there is none.
        row_metadata: of the likelihood, which says it where it knows better than the data.
        totals: of the optimiser step by view; none where the batch is all there is.
        strength: of the pairs, the same for both of their sides; see `ImageBatch.strength`.
        tokens: of the likelihood, by view, where it gives each by itself.
    """
    device = next(iter(policy.values())).device
    of_pairs = {part: send(rows, device) for part, rows in (strength or {}).items()}
    return {
        name: Likelihoods(
            values,
            reference.get(name),
            whole_step=totals.get(name),
            tokens=(tokens or {}).get(name),
            **{**of_pairs, **row_metadata.get(name, {})},
        )
        for name, values in policy.items()
    }


@torch.no_grad()
def totals_of_step(
    parts: Sequence[MicroBatch],
    *,
    step: int,
    views: frozenset[str],
    likelihood: AbstractLikelihood,
    model: AbstractTrainable,
    reference: Callable[[MicroBatch], Mapping[str, Tensor]] | None,
    every_row: bool = False,
) -> dict[str, StepTotals]:
    """Prepare the parts of a step, and add them up.

    Args:
        parts: all micro-batches of this rank; what is computed stays in them.
        step: number of the optimiser step.
        views: that the objective reads.
        likelihood, model: of the run.
        reference: gives a prepared part's reference values; None where log-ratios are not asked
            for, and nothing goes through the network.
        every_row: whether the rows are asked for one by one.

    Returns:
        The totals of every view.
    """
    found: list[Mapping[str, Likelihoods]] = []
    for part in parts:
        part.prepared = likelihood.prepare(model, part.batch)
        known: Mapping[str, Tensor] = {}
        if reference is not None:
            part.reference = known = reference(part)
            policy = likelihood.evaluate(model, part.prepared)
        row_metadata = likelihood.row_metadata(part.prepared)
        if reference is None:
            policy = {view: _as_many_rows(part.batch, row_metadata.get(view, {})) for view in views}
        found.append(views_of(policy, known, row_metadata, {}, part.batch.strength))
    return {
        view: StepTotals.of([of[view] for of in found], step=step, every_row=every_row)
        for view in sorted(views)
    }


def _as_many_rows(batch: Any, row_metadata: Mapping[str, Tensor]) -> Tensor:
    """Zeros in place of likelihoods, of which only the number counts; on the device of the rest."""
    for values in row_metadata.values():
        return torch.zeros(len(values), device=values.device)
    return torch.zeros(len(batch.sample_ids))
