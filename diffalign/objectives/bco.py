"""Binary classifier optimisation: each side is classified alone, against the mean reward so far.

The threshold delta is the mean of the rewards of all samples that the run has seen, on all ranks,
the present step included: with more than one micro-batch a step, the policy runs over all of them
once more, without gradient. It is kept in checkpoints. A step with a reward that is not finite does
not enter it.

Source: Jung et al. 2024, arXiv:2404.04656, with the running mean of TRL's `BCOTrainer`; not
its density ratio for desirable and undesirable samples of different prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import AbstractObjective, Known, LossOutput, StepTotals, Views
from diffalign.objectives.bco_pair import bco_loss
from diffalign.objectives.pair import Beta, side_metrics


class RunningMean:
    """Mean of all values so far; on the device of the values."""

    def __init__(self) -> None:
        self.mean = torch.zeros(())
        self.count = torch.zeros(())
        self.step = -1

    def update(self, gained: Tensor, added: Tensor) -> Tensor:
        """Take in a sum of so many values, unless it is not finite; the mean, a scalar without
        gradient."""
        mean, count = self.mean.to(added), self.count.to(added) + added
        moved = mean + (gained - added * mean) / count
        finite = moved.isfinite()
        self.mean = torch.where(finite, moved, mean)
        self.count = torch.where(finite, count, count - added)
        return self.mean


@dataclass(frozen=True, kw_only=True)
class BCO(AbstractObjective):
    """BCO over pairs, or over single responses, with a running threshold; a pair's loss is the mean
    of its two sides."""

    views: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected"})
    needs_reference: ClassVar[bool] = True
    takes_unpaired: ClassVar[bool] = True
    must_know: ClassVar[Known] = "log_ratios"

    beta: Beta
    """Pull towards the reference, in the units of `dpo.py`."""

    @cached_property
    def _rewards(self) -> RunningMean:
        """No field: settings do not change, and a run's configuration is not its state."""
        return RunningMean()

    def __call__(self, views: Views) -> LossOutput:
        chosen, rejected = (self.beta * views[side].log_ratio for side in ("chosen", "rejected"))
        delta = self._threshold([views["chosen"].totals, views["rejected"].totals])
        if views["chosen"].rows is None:
            loss = bco_loss(chosen - delta, rejected - delta) / 2
        else:
            loss = -logsigmoid(torch.cat([chosen - delta, delta - rejected]))
        return LossOutput(loss, {**side_metrics(views, chosen, rejected), "delta": delta})

    def _threshold(self, totals: Sequence[StepTotals]) -> Tensor:
        """The mean reward so far, the whole present step included, which is taken in once."""
        rewards = self._rewards
        if totals[0].step < 0 or totals[0].step != rewards.step:
            rewards.step = totals[0].step
            gained = self.beta * torch.stack([of.log_ratio for of in totals]).sum()
            rewards.update(gained, torch.stack([of.rows for of in totals]).sum())
        return rewards.mean

    def state_dict(self) -> dict[str, Tensor]:
        """The running mean and how many rewards it is of."""
        return {"mean": self._rewards.mean, "count": self._rewards.count}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a running mean."""
        self._rewards.mean, self._rewards.count = state["mean"], state["count"]
