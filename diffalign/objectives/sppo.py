"""Self-play preference optimisation: regress each log-ratio onto how often its side wins.

The paper's reference is the policy of the previous round, and its pairs are sampled from that.

Source: Wu et al. 2024, arXiv:2405.00675 (their eta is one over our beta). TRL calls the
form with certain wins `sppo_hard`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.objectives.base import (
    AbstractObjective,
    LossOutput,
    Views,
    check_beta,
    pair_metrics,
)


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
class SPPO(AbstractObjective):
    """SPPO over one chosen and one rejected view; the sum of both sides."""

    views: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected"})
    needs_reference: ClassVar[bool] = True

    beta: float
    """Pull towards the reference; 0.001 in the paper, for sums over tokens."""
    win_rate: float = 1.0
    """Probability that the chosen side is really preferred."""

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if not 0.5 < self.win_rate <= 1:
            raise ValueError(
                f"win_rate must be above 0.5 and at most 1, got {self.win_rate}: it is how often "
                f"the chosen side wins"
            )

    def __call__(self, views: Views) -> LossOutput:
        chosen, rejected = views["chosen"].log_ratio, views["rejected"].log_ratio
        loss = sppo_loss(chosen, self.win_rate, beta=self.beta)
        loss = loss + sppo_loss(rejected, 1 - self.win_rate, beta=self.beta)
        return LossOutput(loss, pair_metrics(self.beta * chosen, self.beta * rejected))
