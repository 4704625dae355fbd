"""Kahneman-Tversky optimisation: each side is compared alone, against the average gain.

The chosen side counts as a desirable sample and the rejected one as an undesirable one; a sample
may also have one of the two alone, as in the paper. A sigmoid
represents the value function, so what is far from the baseline on either side has little pull.

The baseline estimates the policy's divergence from the reference, and carries no gradient. In the
paper it is the mean log-ratio of responses to other prompts (the view `mismatched`); Diffusion-KTO
takes the mean of the batch itself, and so do we unless asked. All are means over the whole
optimiser step, and held at 0 from below unless `clamp_baseline` is false. With more than one
micro-batch a step, the policy runs over all of them once more for it, without gradient.

Diffusion-KTO's code has three offsets: its default is baseline `batch`; what it calls sigmoid is
`classes`, and original is `mismatched`, both of them with `clamp_baseline` false. It holds only its
default at 0, and says so nowhere; here each of the two is a setting.

Sources: Ethayarajh et al. 2024, arXiv:2402.01306; Li et al. 2024, arXiv:2404.04465, whose
code multiplies whole squared errors: its beta of 1000 is 2000 here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import AbstractObjective, Known, LossOutput, Views
from diffalign.objectives.pair import Beta, side_metrics
from diffalign.ranges import AtLeast

Utility = Literal["sigmoid", "loss_averse", "risk_seeking_1", "risk_seeking_2", "risk_seeking_3"]

GENTLE = 100.0
"""What risk_seeking_2 divides beta times the gain by, in the authors' code."""


def kto_loss(
    log_ratio: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable: bool,
    utility: Utility = "sigmoid",
) -> Tensor:
    """One minus the value of each sample.

    Args:
        log_ratio: policy minus reference, shape [n].
        baseline: what counts as neither gain nor loss, a scalar.
        beta: pull towards the reference, in one over the units of the log-ratio; greater than 0.
        desirable: whether samples should become more likely, or less.
        utility: how a gain is valued. Only the sigmoid has a bounded loss, of 0 to 1; values of
            different utilities do not compare. Of undesirable samples, risk_seeking_1 and
            loss_averse have the same gradient.

    Returns:
        Shape [n]; under the sigmoid one half at the baseline. The exponent of risk_seeking_2 is
        held at half of what the type can hold, beyond which there is no gradient.
    """
    gain = log_ratio - baseline
    wanted = beta * gain if desirable else -beta * gain
    match utility:
        case "sigmoid":
            return torch.sigmoid(-wanted)
        case "loss_averse":
            return 1 - logsigmoid(wanted)
        case "risk_seeking_1":
            return 1 + logsigmoid(-wanted) if desirable else 1 - logsigmoid(wanted)
        case "risk_seeking_2":
            grown = (beta * gain / GENTLE).clamp(max=math.log(torch.finfo(gain.dtype).max) / 2)
            return 2 - grown.exp() if desirable else 2 + grown.exp()
        case "risk_seeking_3":
            return 1 + logsigmoid(-wanted)


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
    utility: Utility = "sigmoid"
    """Value of a gain: `sigmoid` as in the paper; `loss_averse` is its logarithm, and the three
    `risk_seeking` ones are those of Diffusion-KTO's code, of which the second divides beta times
    the gain by 100. All but the sigmoid are unbounded, so that outliers decide."""
    baseline: Literal["batch", "classes", "mismatched"] = "batch"
    """Mean log-ratio of what: of the batch itself; of desirable and undesirable samples, each a
    mean of its own, averaged; or of the view `mismatched`, which belongs to other prompts, as the
    paper has it."""
    clamp_baseline: bool = True
    """Hold the baseline at 0 from below: the divergence that it estimates is never negative."""

    @property
    def views(self) -> frozenset[str]:
        """Both sides, and `mismatched` where the baseline is taken from it."""
        sides = frozenset({"chosen", "rejected"})
        return sides | {"mismatched"} if self.baseline == "mismatched" else sides

    def __call__(self, views: Views) -> LossOutput:
        chosen, rejected = views["chosen"].log_ratio, views["rejected"].log_ratio
        baseline = self._baseline(views)
        gains, losses = (
            kto_loss(side, baseline, beta=self.beta, desirable=side is chosen, utility=self.utility)
            for side in (chosen, rejected)
        )
        gains, losses = self.desirable_weight * gains, self.undesirable_weight * losses
        paired = views["chosen"].rows is None
        loss = (gains + losses) / 2 if paired else torch.cat([gains, losses])
        metrics = side_metrics(views, self.beta * chosen, self.beta * rejected)
        return LossOutput(loss, {**metrics, "baseline": baseline})

    def _baseline(self, views: Views) -> Tensor:
        """The mean log-ratio that gains are counted from, a scalar without gradient."""
        measured = ("mismatched",) if self.baseline == "mismatched" else ("chosen", "rejected")
        totals = [views[view].totals for view in measured]
        gained = torch.stack([of.log_ratio for of in totals])
        rows = torch.stack([of.rows for of in totals])
        if self.baseline == "classes":
            baseline = (gained / rows.clamp(min=1)).mean()
        else:
            baseline = gained.sum() / rows.sum()
        return baseline.clamp(min=0) if self.clamp_baseline else baseline

    def note(self) -> str:
        """What is not the usual value function."""
        if self.utility == "sigmoid":
            return ""
        said = f"utility {self.utility}: the loss is not bounded"
        if self.utility == "risk_seeking_2":
            said += f"; beta times the gain is divided by {GENTLE:g}"
        return said
