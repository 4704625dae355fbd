"""Odds-ratio preference optimisation: fine-tuning that also lowers the odds of a rejected side.

Odds are those of the geometric mean probability of a token, so this is for tokens: minus half a
denoising error is no log-probability, and its odds mean nothing.

Source: Hong, Lee and Thorne 2024, arXiv:2403.07691, eq. 6 and 7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import (
    TOKENS,
    AbstractObjective,
    Known,
    LossOutput,
    Measure,
    Part,
    Views,
)
from diffalign.objectives.pair import CHOSEN_AND_REJECTED, EITHER_ORDER, expected_loss, pair_metrics
from diffalign.objectives.sft import negative_log_likelihood
from diffalign.ranges import MoreThan


def log_complement(log_probability: Tensor) -> Tensor:
    """log(1 - p) from log p, without loss of digits near p = 0 and p = 1.

    Args:
        log_probability: any shape, at most 0. Within one rounding step of 0 it is taken to be that
            step, and has no gradient: the odds of a certainty are infinite.

    Returns:
        The same shape, finite, below 0.
    """
    x = log_probability.clamp(max=-torch.finfo(log_probability.dtype).eps)
    probable = x > -math.log(2)
    # Each branch sees only arguments it can take: a NaN in the one not chosen would still reach
    # the gradient.
    near_one, near_zero = torch.where(probable, x, -1.0), torch.where(probable, -1.0, x)
    return torch.where(
        probable, torch.log(-torch.expm1(near_one)), torch.log1p(-torch.exp(near_zero))
    )


def log_odds(log_probability: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, any shape; see `log_complement` for certainties."""
    return log_probability - log_complement(log_probability)


OddsWeight = Annotated[
    float, MoreThan(0, "without its preference term this is fine-tuning, the objective sft")
]


@dataclass(frozen=True, kw_only=True)
class ORPO(AbstractObjective):
    """ORPO over one chosen and one rejected view of token likelihoods, without a reference."""

    views: ClassVar[frozenset[str]] = CHOSEN_AND_REJECTED
    needs_reference: ClassVar[bool] = False
    must_know: ClassVar[Known] = "counts"
    reads: ClassVar[frozenset[Measure]] = TOKENS
    takes_strength: ClassVar[frozenset[Part]] = EITHER_ORDER

    odds_weight: OddsWeight = 0.1
    """Weight of the preference term next to the negative log-likelihood per token of the chosen
    side; lambda in the paper, beta in TRL."""

    def __call__(self, views: Views) -> LossOutput:
        return expected_loss(self.own(views), self._loss, known=self.must_know)

    def _loss(self, views: Views) -> LossOutput:
        chosen, rejected = (log_odds(views[side].average) for side in ("chosen", "rejected"))
        preference = -logsigmoid(chosen - rejected)
        supervised = negative_log_likelihood(views["chosen"])
        metrics = {
            **pair_metrics(chosen, rejected, views["chosen"].preference),
            "supervised_term": supervised.detach(),
            "preference_term": preference.detach(),
        }
        return LossOutput(supervised + self.odds_weight * preference, metrics)
