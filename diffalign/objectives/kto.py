"""Kahneman-Tversky optimisation: each side is compared alone, against the average gain.

The chosen side counts as a desirable sample and the rejected one as an undesirable one; a sample
may also have one of the two alone, as in the paper. A sigmoid
represents the value function, so what is far from the baseline on either side has little pull.

The baseline estimates the policy's divergence from the reference, and carries no gradient. In the
paper it is the mean log-ratio of responses to other prompts (the view `mismatched`); Diffusion-KTO
takes the mean of the batch itself, and so do we unless asked. Both are means over the whole
optimiser step, and held at 0 from below. With more than one micro-batch a step, the policy runs
over all of them once more for it, without gradient.

Sources: Ethayarajh et al. 2024, arXiv:2402.01306; Li et al. 2024, arXiv:2404.04465, whose
code multiplies whole squared errors: its beta of 1000 is 2000 here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.objectives.base import (
    AbstractObjective,
    Beta,
    Known,
    LossOutput,
    Views,
    side_metrics,
)
from diffalign.ranges import AtLeast


def kto_loss(log_ratio: Tensor, baseline: Tensor, *, beta: float, desirable: bool) -> Tensor:
    """One minus the value of each sample.

    Args:
        log_ratio: policy minus reference, shape [n].
        baseline: what counts as neither gain nor loss, a scalar.
        beta: pull towards the reference, in one over the units of the log-ratio; greater than 0.
        desirable: whether samples should become more likely, or less.

    Returns:
        Shape [n], between 0 and 1; one half at the baseline.
    """
    gain = log_ratio - baseline
    return torch.sigmoid(-beta * gain if desirable else beta * gain)


@dataclass(frozen=True, kw_only=True)
class KTO(AbstractObjective):
    """KTO over pairs, or over single responses; a pair's loss is the mean of its two sides."""

    needs_reference: ClassVar[bool] = True
    takes_unpaired: ClassVar[bool] = True
    must_know: ClassVar[Known] = "log_ratios"

    beta: Beta
    """Pull towards the reference, in the units of `dpo.py`."""
    desirable_weight: Annotated[float, AtLeast(0)] = 1.0
    """Weight of chosen sides. For every rejected side, 1 to 4/3 times its weight is advised."""
    undesirable_weight: Annotated[float, AtLeast(0)] = 1.0
    """Weight of rejected sides."""
    baseline: Literal["batch", "mismatched"] = "batch"
    """Mean log-ratio of what: of the batch itself, or of the view `mismatched`, responses that
    belong to other prompts, as the paper has it."""

    @property
    def views(self) -> frozenset[str]:
        """Both sides, and `mismatched` where the baseline is taken from it."""
        sides = frozenset({"chosen", "rejected"})
        return sides | {"mismatched"} if self.baseline == "mismatched" else sides

    def __call__(self, views: Views) -> LossOutput:
        chosen, rejected = views["chosen"].log_ratio, views["rejected"].log_ratio
        measured = ("mismatched",) if self.baseline == "mismatched" else ("chosen", "rejected")
        totals = [views[view].totals for view in measured]
        gained = torch.stack([of.log_ratio for of in totals]).sum()
        baseline = (gained / torch.stack([of.rows for of in totals]).sum()).clamp(min=0)
        gains = kto_loss(chosen, baseline, beta=self.beta, desirable=True)
        losses = kto_loss(rejected, baseline, beta=self.beta, desirable=False)
        gains, losses = self.desirable_weight * gains, self.undesirable_weight * losses
        paired = views["chosen"].rows is None
        loss = (gains + losses) / 2 if paired else torch.cat([gains, losses])
        metrics = side_metrics(views, self.beta * chosen, self.beta * rejected)
        return LossOutput(loss, {**metrics, "baseline": baseline})
