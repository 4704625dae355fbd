"""Efficient exact optimisation: the reverse divergence of the preference that the policy implies.

DPO minimises the divergence in the forward direction. Where labels are certain the reverse one is
infinite, so they are held at 1 - epsilon.

Diffusion-DMPO (Li et al. 2025, arXiv:2507.07510) is this loss on denoising errors, with an epsilon
of 0.01.

Source: Ji et al. 2024, arXiv:2402.00856, for pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import Likelihoods, LossOutput
from diffalign.objectives.pair import AbstractPairObjective
from diffalign.ranges import Between


def exo_loss(margin: Tensor, *, beta: float, epsilon: float) -> Tensor:
    """KL divergence of the implied preference from the labelled one.

    Args:
        margin: log-ratio of the chosen side minus that of the rejected side, shape [B].
        beta: pull towards the reference, in one over the units of the margin; greater than 0.
        epsilon: labelled probability of the rejected side, in (0, 0.5).

    Returns:
        Shape [B], at least 0; 0 where sigmoid(beta * margin) == 1 - epsilon.
    """
    logit = beta * margin
    for_chosen = torch.sigmoid(logit) * (logsigmoid(logit) - math.log1p(-epsilon))
    for_rejected = torch.sigmoid(-logit) * (logsigmoid(-logit) - math.log(epsilon))
    return for_chosen + for_rejected


@dataclass(frozen=True, kw_only=True)
class EXO(AbstractPairObjective):
    """EXO over one chosen and one rejected view."""

    compares_rewards: ClassVar[bool] = True

    epsilon: Annotated[
        float, Between(0, 0.5, "from a certain label all is infinitely far", without=[0, 0.5])
    ] = 1e-3
    """Labelled probability that the rejected side is the better one."""

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        margin = chosen.log_ratio - rejected.log_ratio
        return LossOutput(exo_loss(margin, beta=self.beta, epsilon=self.epsilon))
