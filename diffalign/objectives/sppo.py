"""Self-play preference optimisation: regress each log-ratio onto how often its side wins.

The paper's reference is the policy of the previous round, and its pairs are sampled from that.

Source: Wu et al. 2024, arXiv:2405.00675 (their eta is one over our beta). TRL calls the
form with certain wins `sppo_hard`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from diffalign.objectives.base import Likelihoods, LossOutput
from diffalign.objectives.pair import AbstractPairObjective, Beta
from diffalign.ranges import Between


def sppo_loss(log_ratio: Tensor, win_rate: float | Tensor, *, beta: float) -> Tensor:
    """Squared distance of each log-ratio from (win_rate - 1/2) / beta.

    Args:
        log_ratio: policy minus reference of one side, shape [B].
        win_rate: probability that this side is preferred; a number or shape [B].
        beta: pull towards the reference, in one over the units of the log-ratio; greater than 0.

    Returns:
        Shape [B].
    """
    return (log_ratio - (win_rate - 0.5) / beta) ** 2


@dataclass(frozen=True, kw_only=True)
class SPPO(AbstractPairObjective):
    """SPPO over one chosen and one rejected view; the sum of both sides."""

    beta: Beta
    """Pull towards the reference; 0.001 in the paper, for sums over tokens."""
    win_rate: Annotated[
        float, Between(0.5, 1, "it is how often the chosen side wins", without=[0.5])
    ] = 1.0
    """Probability that the chosen side is really preferred."""

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        loss = sppo_loss(chosen.log_ratio, self.win_rate, beta=self.beta)
        return LossOutput(loss + sppo_loss(rejected.log_ratio, 1 - self.win_rate, beta=self.beta))
