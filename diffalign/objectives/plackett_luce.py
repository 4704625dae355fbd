"""A ranking of several views by how much the policy prefers each, the most visible image first.

LPOI shows a response next to its image and to ever less of it. With s_k the reward of the k-th of K
views, the probability that they come in this order (Plackett-Luce) is the product over k of
exp(s_k) / sum of exp(s_j) over j from k on. Its loss is a term of a `weighted_sum` next to `dpo`
and `anchor`; with two views it is `dpo` of these.

Source: Pesaran Zadeh et al. 2025, arXiv:2505.21061 (LPOI), as in fatemehpesaran310/lpoi.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.objectives.base import AbstractObjective, LossOutput, Views
from diffalign.objectives.pair import Beta


def ranking_loss(rewards: Sequence[Tensor]) -> Tensor:
    """Minus the log-probability that K candidates come in this order.

    Args:
        rewards: K of shape [B], the one that should be highest first.

    Returns:
        Shape [B]; log K! where all are equal.
    """
    ordered = torch.stack(list(rewards))
    behind = torch.stack([ordered[place:].logsumexp(dim=0) for place in range(len(ordered) - 1)])
    return (behind - ordered[:-1]).sum(dim=0)


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(AbstractObjective):
    """A ranking of views by their log-ratios."""

    needs_reference: ClassVar[bool] = True

    beta: Beta
    """Pull towards the reference, in the units of `dpo.py`; 0.1 in LPOI."""
    ranked: tuple[str, ...]
    """Names of the views, the one that should be preferred to all others first, such as `[chosen,
    chosen@quarter, chosen@half]`. LPOI has five."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.ranked)) != len(self.ranked) or len(self.ranked) < 2:
            raise ValueError(
                f"ranked names two or more different views, the best one first, got "
                f"{', '.join(self.ranked) or 'none'}"
            )

    @property
    def views(self) -> frozenset[str]:
        """Those that are ranked."""
        return frozenset(self.ranked)

    def __call__(self, views: Views) -> LossOutput:
        rewards = [self.beta * views[name].log_ratio for name in self.ranked]
        told = torch.stack(rewards).detach()
        in_order = (told[:-1] > told[1:]).all(dim=0)
        return LossOutput(ranking_loss(rewards), {"in_order": in_order.to(told.dtype)})
