"""Negative preference optimisation: unlearn one view, and come to rest where it is unlikely.

The gradient is that of unlearning by ascent, times a weight that falls as the view's likelihood
does. Usually next to a term that keeps something else, in a `weighted_sum`.

Source: Zhang et al. 2024, arXiv:2404.05868.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import AbstractObjective, LossOutput, Views
from diffalign.objectives.pair import Beta


def npo_loss(log_ratio: Tensor, *, beta: float) -> Tensor:
    """How likely what should be forgotten still is.

    Args:
        log_ratio: policy minus reference, shape [B].
        beta: how soon the pull fades, in one over the units of the log-ratio; greater than 0.

    Returns:
        Shape [B], above 0; (2 / beta) log 2 at the reference.
    """
    return -2 / beta * logsigmoid(-beta * log_ratio)


@dataclass(frozen=True, kw_only=True)
class NPO(AbstractObjective):
    """NPO of the rejected view."""

    views: ClassVar[frozenset[str]] = frozenset({"rejected"})
    needs_reference: ClassVar[bool] = True
    takes_unpaired: ClassVar[bool] = True

    beta: Beta
    """How soon the pull fades; 0.1 in the paper, for sums over tokens."""

    def __call__(self, views: Views) -> LossOutput:
        rejected = views["rejected"].log_ratio
        loss = npo_loss(rejected, beta=self.beta)
        return LossOutput(loss, {"rejected_reward": self.beta * rejected.detach()})
