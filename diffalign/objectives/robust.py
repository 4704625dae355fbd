"""Robust DPO: unbiased although a known share of the pairs is the wrong way round.

In expectation over labels flipped at `flip_rate`, the loss is DPO's on the true ones. What is
subtracted makes it unbounded below: a pair that is already far apart goes on paying. It is called
rDPO in its paper, as Re-Align's loss is in another one.

Source: Chowdhury, Kini and Natarajan 2024, arXiv:2403.00409.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import Likelihoods, LossOutput
from diffalign.objectives.pair import AbstractPairObjective
from diffalign.ranges import Between


def robust_loss(margin: Tensor, *, beta: float, flip_rate: float) -> Tensor:
    """DPO's loss with its bias under flipped labels removed.

    Args:
        margin: log-ratio of the chosen side minus that of the rejected side, shape [B].
        beta: pull towards the reference, in one over the units of the margin; greater than 0.
        flip_rate: share of the pairs that are the wrong way round, in [0, 0.5).

    Returns:
        Shape [B]; can be negative.
    """
    logit = beta * margin
    as_labelled, flipped = -logsigmoid(logit), -logsigmoid(-logit)
    return ((1 - flip_rate) * as_labelled - flip_rate * flipped) / (1 - 2 * flip_rate)


@dataclass(frozen=True, kw_only=True)
class RobustDPO(AbstractPairObjective):
    """Robust DPO over one chosen and one rejected view."""

    compares_rewards: ClassVar[bool] = True

    flip_rate: Annotated[
        float, Between(0, 0.5, "at one half the labels say nothing", without=[0.5])
    ] = 0.1
    """Share of the pairs that are the wrong way round; 0 is DPO."""

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        margin = chosen.log_ratio - rejected.log_ratio
        return LossOutput(robust_loss(margin, beta=self.beta, flip_rate=self.flip_rate))
