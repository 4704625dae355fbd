"""Self-play: prefer an image of the data to one that the reference sampled for the same prompt.

The sampled image is not always worse. Where the policy denoises the chosen image at least as well
as the reference does (it has passed the reference there), the reference's own image is pushed
away, as in DPO; where it does not, the reference is taken to be ahead, and its image is learnt.
One sample of time and noise decides, so the decision is noisy.

Source: Zhang et al. 2024, arXiv:2410.05255 (SePPO). Its training code is not public. That ties push
away, and that the decision carries no gradient, are our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import AbstractObjective, LossOutput, Measure, Views
from diffalign.objectives.pair import Beta, pair_metrics

Anchor = Literal["sign", "indicator", "none"]

_WHEN_BEHIND = {"sign": -1.0, "indicator": 0.0, "none": 1.0}
"""What multiplies the sampled log-ratio where the reference is ahead."""


def anchor_sign(chosen_log_ratio: Tensor, *, anchor: Anchor) -> Tensor:
    """Whether the sampled image is pushed away (1) or not, decided on the chosen one.

    Args:
        chosen_log_ratio: policy minus reference on the chosen image, shape [B].
        anchor: `sign` gives -1 where it is below 0 (the sampled image is learnt), `indicator`
            gives 0 (it is left out), `none` gives 1 (DPO).

    Returns:
        Shape [B], without gradient; 1 where policy and reference are equal, as they are when a
        round begins.
    """
    ahead = chosen_log_ratio.detach() >= 0
    return torch.where(ahead, 1.0, _WHEN_BEHIND[anchor]).to(chosen_log_ratio.dtype)


@dataclass(frozen=True, kw_only=True)
class SePPO(AbstractObjective):
    """SePPO over a chosen image of the data and one that the reference sampled."""

    views: ClassVar[frozenset[str]] = frozenset({"chosen", "sampled"})
    needs_reference: ClassVar[bool] = True
    reads: ClassVar[frozenset[Measure]] = frozenset({"denoising error"})

    beta: Beta
    """Pull towards the reference, in the units of `dpo.py`: 5000 is the Salesforce `beta_dpo`. No
    default; the paper does not report its own."""
    anchor: Anchor = "sign"
    """What becomes of the sampled image where the reference is ahead: `sign` learns it,
    `indicator` leaves it out, `none` pushes it away all the same (an ablation, which is DPO)."""

    def __call__(self, views: Views) -> LossOutput:
        chosen, sampled = views["chosen"].log_ratio, views["sampled"].log_ratio
        sign = anchor_sign(chosen, anchor=self.anchor)
        rewards = self.beta * chosen, self.beta * sign * sampled
        loss = -logsigmoid(rewards[0] - rewards[1])
        metrics = pair_metrics(self.beta * chosen, self.beta * sampled)
        return LossOutput(loss, {**metrics, "flipped": (sign != 1).to(sign.dtype)})
