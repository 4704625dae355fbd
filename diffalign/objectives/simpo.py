"""Simple preference optimisation: the average log-likelihood is the reward, and no reference.

Averages over tokens keep long responses from winning by length or losing by it, and the target
margin asks for more than being right.

Source: Meng, Xia and Chen 2024, arXiv:2405.14734, eq. 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import (
    AbstractObjective,
    LossOutput,
    Views,
    check_beta,
    pair_metrics,
)


def simpo_loss(margin: Tensor, *, beta: float, gamma: float) -> Tensor:
    """DPO's loss on a margin of averages, less a target.

    Args:
        margin: average log-likelihood per token of the chosen side minus that of the rejected
            side, shape [B].
        beta: scale of the rewards; greater than 0.
        gamma: how much larger the chosen side's reward should be.

    Returns:
        Shape [B]; log 2 where beta * margin == gamma.
    """
    return -logsigmoid(beta * margin - gamma)


@dataclass(frozen=True, kw_only=True)
class SimPO(AbstractObjective):
    """SimPO over one chosen and one rejected view, without a reference."""

    views: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected"})
    needs_reference: ClassVar[bool] = False

    beta: float
    """Scale of the rewards; 2 to 2.5 in the paper, on averages over tokens."""
    gamma: float
    """Target of the reward margin; 0.3 to 0.6 times beta in the paper."""

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if self.gamma < 0:
            raise ValueError(
                f"gamma must be at least 0, got {self.gamma}: it is how far the chosen side should "
                f"lie above the rejected one"
            )

    def __call__(self, views: Views) -> LossOutput:
        chosen, rejected = views["chosen"].average, views["rejected"].average
        loss = simpo_loss(chosen - rejected, beta=self.beta, gamma=self.gamma)
        return LossOutput(loss, pair_metrics(self.beta * chosen, self.beta * rejected))
