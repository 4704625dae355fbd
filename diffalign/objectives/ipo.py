"""Identity preference optimisation: regress the log-ratio margin onto a fixed gap.

DPO pushes a pair apart for as long as it is in the batch. IPO stops at a margin of
1 / (2 * beta), which is what protects it from mislabelled pairs.

The log-ratio is taken as the likelihood gives it. TRL divides it by the number of tokens, on the
authors' advice as it says: that is `likelihood.reduction: mean` here, and another scale of beta.

Source: Azar et al. 2023, arXiv:2310.12036, eq. 17 (their tau is our beta).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.objectives.base import Likelihoods, LossOutput
from diffalign.objectives.pair import AbstractPairObjective, Beta


def ipo_loss(margin: Tensor, *, beta: float) -> Tensor:
    """Squared distance of each margin from the target gap.

    Args:
        margin: log-ratio of the chosen side minus that of the rejected side, shape [B], in the
            units of the likelihood that produced it (nats for token sums, half a mean squared
            error for denoising).
        beta: pull towards the reference, in one over those units; greater than 0.

    Returns:
        Loss of each pair, shape [B]; zero where margin == 1 / (2 * beta).
    """
    return (margin - 1.0 / (2.0 * beta)) ** 2


@dataclass(frozen=True, kw_only=True)
class IPO(AbstractPairObjective):
    """IPO over one chosen and one rejected view."""

    compares_rewards: ClassVar[bool] = True

    beta: Beta
    """Pull towards the reference. No default: published values run from 0.1 for sums over tokens
    to 5000 for means over latent pixels."""
    in_rewards: bool = False
    """Multiply by the square of beta: the distance of beta * margin from one half, squared. The
    same optimum; for denoising, whose margins are so small that the loss as published is about
    1e-8 and its gradient lost next to the epsilon of Adam."""

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        loss = ipo_loss(chosen.log_ratio - rejected.log_ratio, beta=self.beta)
        return LossOutput(self.beta**2 * loss if self.in_rewards else loss)
