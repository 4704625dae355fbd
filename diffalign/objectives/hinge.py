"""Hinge loss on the reward margin: a pair counts until it is told apart by 1.

Sources: Zhao et al. 2023, arXiv:2305.10425 (SLiC), with a reference as in Liu et al. 2023,
arXiv:2309.06657 (RSO).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import relu

from diffalign.objectives.base import Likelihoods, LossOutput
from diffalign.objectives.pair import AbstractPairObjective, Beta


def hinge_loss(margin: Tensor, *, beta: float) -> Tensor:
    """What the reward margin lacks to 1.

    Args:
        margin: log-ratio of the chosen side minus that of the rejected side, shape [B].
        beta: pull towards the reference, in one over the units of the margin; greater than 0.

    Returns:
        Shape [B], at least 0; 0 and without gradient from a margin of 1 / beta on.
    """
    return relu(1 - beta * margin)


@dataclass(frozen=True, kw_only=True)
class Hinge(AbstractPairObjective):
    """Hinge loss over one chosen and one rejected view."""

    compares_rewards: ClassVar[bool] = True

    beta: Beta
    """Pull towards the reference, in the units of `dpo.py`; RSO has 0.05 for sums over tokens."""

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        margin = chosen.log_ratio - rejected.log_ratio
        return LossOutput(hinge_loss(margin, beta=self.beta))
