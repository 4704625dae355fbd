"""Evaluation on pairs that are never trained on: where their accuracy stops, a run has learnt what
it can, however its training figures go on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffalign import world
from diffalign.config import MAY_CHANGE
from diffalign.data.held_out import HeldOut
from diffalign.errors import DataError
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.models.base import AbstractTrainable
from diffalign.models.devices import evaluation_mode
from diffalign.models.sharding import is_shared_out
from diffalign.objectives.base import AbstractObjective, Likelihoods, Views
from diffalign.training.figures import reward_of
from diffalign.training.hooks.base import AbstractHook, StepOutcome, TrainingRun, inspecting
from diffalign.training.look_ahead import MicroBatch
from diffalign.views import View


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the pairs that `data.holdout` or `responses.holdout` keeps back are evaluated."""

    every: int = field(default=100, metadata=MAY_CHANGE)
    """Optimiser steps between evaluations; there is one before the first step, and one after the
    last."""
    pairs: int = field(default=256, metadata=MAY_CHANGE)
    """How many of the held-out pairs are looked at: the same ones each time, in every run."""
    visits: int = field(default=1, metadata=MAY_CHANGE)
    """How often each is seen, under as many noises and times; these too are the same each time."""

    def __post_init__(self) -> None:
        for name in ("every", "pairs", "visits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class HeldOutEvaluation(AbstractHook):
    """Loss, implicit accuracy and drift on held-out pairs, under `held_out/` in `metrics.jsonl`.

    The ranks share the forward passes; loss and accuracy are then computed over all pairs at once,
    as of one batch.
    """

    def __init__(
        self,
        held_out: HeldOut[Any],
        config: EvaluationConfig,
        reference: Sequence[HeldOutValues] | None = None,
    ) -> None:
        """
        Args:
            held_out: the pairs.
            config: how they are evaluated.
            reference: `values_of_held_out`, where the run cannot run its reference.
        """
        self._held_out, self._config, self._reference = held_out, config, reference

    def start(self, run: TrainingRun) -> Mapping[str, float]:
        return {} if run.step else self._evaluate(run)

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> Mapping[str, float]:
        due = outcome.complete or run.step % self._config.every == 0
        return self._evaluate(run) if due else {}

    def _parts_of_rank(self) -> Iterator[MicroBatch]:
        """This rank's batches, with the reference's values where these are known."""
        batches = self._held_out.share_of_rank(pairs=self._config.pairs, visits=self._config.visits)
        if self._reference is None:
            yield from map(MicroBatch, batches)
            return
        for batch, (sample_ids, values) in zip(batches, self._reference, strict=True):
            if batch.sample_ids != sample_ids:
                raise DataError(
                    f"held-out pairs could be read when the run started, and cannot be now: one of "
                    f"{', '.join(sorted({*sample_ids} ^ {*batch.sample_ids}))}"
                )
            yield MicroBatch(batch, reference=values)

    def _in_step(self, model: AbstractTrainable) -> Iterator[tuple[MicroBatch, bool]]:
        """`_parts_of_rank`, each of which counts; where a network is shared out, further ones that
        do not, until no rank has one left: all ranks must call it equally often."""
        parts = self._parts_of_rank()
        if not is_shared_out(model.network):
            yield from ((part, True) for part in parts)
            return
        while True:
            part = next(parts, None)
            if not any(world.gather(part is not None)):
                return
            yield part or self._spare(), part is not None

    def _spare(self) -> MicroBatch:
        """A part of the main rank, which has one if any has."""
        settings = {"pairs": self._config.pairs, "visits": self._config.visits}
        part = MicroBatch(next(self._held_out.share_of_rank(**settings, rank=0)))
        if self._reference is not None:  # no rank runs one
            part.reference = {}
        return part

    def _evaluate(self, run: TrainingRun) -> dict[str, float]:
        with inspecting(run):
            mine = []
            for part, counts in self._in_step(run.model):
                views = run.views(part)
                if counts:
                    mine.append(_cut(views, part.batch.sample_ids))
            everyone = [part for of_rank in world.gather(mine) for part in of_rank]
            if not everyone:
                return {"held_out/pairs": 0}
            joined, sample_ids = _joined(everyone)
            loss = _loss(run.objective, joined)
        groups = [self._held_out.group(sample_id) for sample_id in sample_ids]
        figures = {
            "pairs": len(set(sample_ids)),
            "loss": loss,
            **implicit_accuracy(joined, groups),
            **calibration_error(run.objective, joined),
            **{
                f"drift/{name}": float(view.log_ratio.mean())
                for name, view in joined.items()
                if view.reference is not None
            },
        }
        return {f"held_out/{n}": figure for n, figure in figures.items() if math.isfinite(figure)}


HeldOutValues = tuple[tuple[str, ...], Mapping[str, Tensor]]
"""Samples of a batch, and the reference's values of them by view."""


def values_of_held_out(
    held_out: HeldOut[Any],
    config: EvaluationConfig,
    likelihood: AbstractLikelihood,
    model: AbstractTrainable,
) -> list[HeldOutValues]:
    """The reference's values of this rank's held-out pairs, batch by batch, for a run that has no
    reference: computed by a model as it was loaded, which is the reference itself."""
    with torch.no_grad(), evaluation_mode(model.network):
        return [
            (batch.sample_ids, likelihood.evaluate(model, likelihood.prepare(model, batch)))
            for batch in held_out.share_of_rank(pairs=config.pairs, visits=config.visits)
        ]


def implicit_accuracy(views: Views, groups: Sequence[str]) -> dict[str, float]:
    """How often the model prefers the chosen response or image, and an interval of that share.

    The preference is that of the implicit reward: the log-ratio, or without a reference the
    log-likelihood, of a token where there are tokens. No preference counts one half, and so does a
    pair of which nobody knows the better side.

    Args:
        views: of n samples.
        groups: n of them; the interval is that of resampled groups.

    Returns:
        `accuracy`, and with two groups or more `accuracy_low` and `accuracy_high` at 95 %; nothing
        where the views are no pairs.
    """
    from diffalign.intervals import grouped_share  # settings are read without scipy

    names = _compared(views)
    if names is None:
        return {}
    chosen, rejected = (reward_of(views[name]) for name in names)
    margin, preference = chosen - rejected, views[names[0]].preference
    if preference is not None:
        margin = margin * (preference - 0.5).sign()
    right = (margin.sign() + 1) / 2
    interval = grouped_share(right.tolist(), groups)
    figures = {"accuracy": float(right.mean())}
    if interval is not None:
        figures |= {"accuracy_low": interval.low, "accuracy_high": interval.high}
    return figures


def calibration_error(objective: AbstractObjective, views: Views) -> dict[str, float]:
    """The expected calibration error of a reward model, whose margins are log-odds of preferences.

    Args:
        objective: of the run; one that does not read scores has no such odds.
        views: of n samples.

    Returns:
        `ece`, in [0, 1/2] where labels are certain; nothing where the views are no scored pairs.
    """
    from diffalign.calibration import reliability  # settings are read without scipy

    names = _compared(views)
    if names is None or objective.reads != {"score"}:
        return {}
    chosen, rejected = (views[name] for name in names)
    labels = None if chosen.preference is None else chosen.preference.tolist()
    return {"ece": reliability((chosen.policy - rejected.policy).tolist(), labels).error}


def _compared(views: Views) -> tuple[str, str] | None:
    """The views of the two sides, next to the images as they are where there are such."""
    parsed = {name: View.parse(name) for name in views if views[name].rows is None}
    plain_first = sorted(parsed, key=lambda n: (parsed[n].condition or "", parsed[n].weights or ""))
    for name in plain_first:
        other = str(replace(parsed[name], response="rejected"))
        if parsed[name].response == "chosen" and other in parsed:
            return name, other
    return None


@dataclass(frozen=True)
class _Part:
    """A batch as far as a loss reads it, on the CPU."""

    sample_ids: tuple[str, ...]
    views: Mapping[str, Mapping[str, Tensor]]
    """View -> fields of `Likelihoods` that it has."""


def _cut(views: Views, sample_ids: tuple[str, ...]) -> _Part:
    found = {
        name: {
            known.name: value.detach().cpu()
            for known in fields(view)
            if isinstance(value := getattr(view, known.name), Tensor)
        }
        for name, view in views.items()
    }
    return _Part(sample_ids, found)


def _joined(parts: Sequence[_Part]) -> tuple[dict[str, Likelihoods], list[str]]:
    """All parts as one batch, and its samples."""
    sample_ids: list[str] = []
    columns: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for part in parts:
        for view, values in part.views.items():
            for name, value in values.items():
                moved = value + len(sample_ids) if name == "rows" else value
                columns[view][name].append(moved)
        sample_ids += part.sample_ids
    fields_of: dict[str, dict[str, Any]] = {
        view: {name: torch.cat(values) for name, values in of_view.items()}
        for view, of_view in columns.items()
    }
    return {view: Likelihoods(**values) for view, values in fields_of.items()}, sample_ids


def _loss(objective: AbstractObjective, views: Views) -> float:
    """The mean loss; what the objective remembers of training stays as it was."""
    remembered = objective.state_dict()
    try:
        return float(objective(views).loss.mean())
    finally:
        objective.load_state_dict(remembered)
