"""Alignment by optimal transport: the whole distribution of margins is moved, and not each of them.

DPO wants each pair's margin under the policy to exceed that pair's margin under the reference. Here
the margins of a step are sorted, and each of the policy is compared with the one of the reference
that has the same rank: a pair that is lost may be made up for by others. `unpaired` compares the
sorted log-ratios of all chosen sides with those of all rejected sides instead, whichever pairs they
are of.

Ranks are those among all pairs of an optimiser step, on all ranks: with one pair a step it is DPO.
(TRL sorts each micro-batch of each device by itself, so that accumulation and the number of devices
change its loss.) With more than one micro-batch a step, the policy runs over all of them once more
for it, without gradient. Of denoising errors the sort mixes timesteps, whose margins differ in
size.

Source: Melnyk et al. 2024, arXiv:2406.05882, in the form of TRL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.objectives.base import (
    AbstractObjective,
    Known,
    Likelihoods,
    LossOutput,
    StepTotals,
    Views,
)
from diffalign.objectives.cdpo import cdpo_loss
from diffalign.objectives.pair import CHOSEN_AND_REJECTED, Beta, pair_metrics
from diffalign.ranges import Between


def ranks(values: Tensor, everyone: Tensor) -> Tensor:
    """Place of each value among sorted ones, of which it is one, up to rounding.

    Args:
        values: shape [n], without gradient.
        everyone: ascending, shape [N].

    Returns:
        Int64 [n], in [0, N): the nearest one. Equal values have the same.
    """
    above = torch.searchsorted(everyone, values).clamp(max=len(everyone) - 1)
    below = (above - 1).clamp(min=0)
    nearer = values - everyone[below] < everyone[above] - values
    return torch.where(nearer, below, above)


def at_rank_of(values: Tensor, everyone: Tensor, others: Tensor) -> Tensor:
    """What has the same rank among others as each value has in its own step.

    Args:
        values: shape [n]; of some rows of a step.
        everyone: of all rows of it, [N], without gradient.
        others: to be compared with those, [N], without gradient.

    Returns:
        Shape [n], without gradient.
    """
    return others.sort().values[ranks(values.detach(), everyone.sort().values)]


def unpaired_loss(
    high: Tensor,
    low: Tensor,
    *,
    everyone_high: Tensor,
    everyone_low: Tensor,
    loss: Callable[[Tensor], Tensor],
) -> Tensor:
    """Mean over ranks of the loss of a sorted high value less the sorted low one of its rank.

    Each row pays for its own two values against what has their ranks in the whole step, which is
    data. The mean over all rows of a step is that over ranks, and so is its gradient; one row says
    nothing by itself.

    Args:
        high: should be above, shape [n]; of some rows of a step.
        low: should be below, shape [n].
        everyone_high, everyone_low: of all rows of the step, [N], without gradient.
        loss: of a difference, elementwise.

    Returns:
        Shape [n].
    """
    of_high = at_rank_of(high, everyone_high, everyone_low)
    of_low = at_rank_of(low, everyone_low, everyone_high)
    moved = loss(high - of_high) + loss(of_low - low)
    known_high = at_rank_of(high, everyone_high, everyone_high)
    known_low = at_rank_of(low, everyone_low, everyone_low)
    return moved - (loss(known_high - of_high) + loss(of_low - known_low)) / 2


@dataclass(frozen=True, kw_only=True)
class AOT(AbstractObjective):
    """AOT over the chosen and rejected views of a step."""

    views: ClassVar[frozenset[str]] = CHOSEN_AND_REJECTED
    needs_reference: ClassVar[bool] = True
    must_know: ClassVar[Known] = "every_row"

    beta: Beta
    """Pull towards the reference, in the units of `dpo.py`."""
    form: Literal["paired", "unpaired"] = "paired"
    """What is sorted: margins of pairs, of policy against reference; or log-ratios of all chosen
    against all rejected sides."""
    label_smoothing: Annotated[float, Between(0, 0.5, without=[0.5])] = 0.0
    """Probability that a pair is the wrong way round."""

    def __call__(self, views: Views) -> LossOutput:
        chosen, rejected = views["chosen"], views["rejected"]
        of_chosen, of_rejected = rows_of_step(chosen), rows_of_step(rejected)
        if self.form == "paired":
            margin = chosen.policy - rejected.policy
            of_policy, of_reference = (of_chosen - of_rejected).unbind(dim=1)
            loss = self._loss(margin - at_rank_of(margin, of_policy, of_reference))
        else:
            loss = unpaired_loss(
                chosen.log_ratio,
                rejected.log_ratio,
                everyone_high=of_chosen[:, 0] - of_chosen[:, 1],
                everyone_low=of_rejected[:, 0] - of_rejected[:, 1],
                loss=self._loss,
            )
        rewards = self.beta * chosen.log_ratio, self.beta * rejected.log_ratio
        return LossOutput(loss, pair_metrics(*rewards))

    def _loss(self, gap: Tensor) -> Tensor:
        return cdpo_loss(gap, beta=self.beta, label_smoothing=self.label_smoothing)


def rows_of_step(view: Likelihoods) -> Tensor:
    """Policy and reference of every row of the step, [N, 2], without gradient."""
    if view.whole_step is not None and view.whole_step.every_row is not None:
        return view.whole_step.every_row
    found = StepTotals.of([view], every_row=True).every_row
    assert found is not None
    return found
