"""Aligned supervised fine-tuning: raise the chosen response's probability, lower the rejected
one's.

Where ORPO compares the odds of both responses, each is compared here against its own opposite, so
the rejected one keeps its pull when the chosen one is already likely. For tokens, as ORPO is.

Source: Wang et al. 2024, arXiv:2409.10571, in the absolute form: sigmoid(log-odds) is the
probability itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.objectives.base import (
    TOKENS,
    AbstractObjective,
    Known,
    LossOutput,
    Measure,
    Part,
    Views,
)
from diffalign.objectives.orpo import OddsWeight, log_complement
from diffalign.objectives.pair import CHOSEN_AND_REJECTED, EITHER_ORDER, expected_loss, pair_metrics
from diffalign.objectives.sft import negative_log_likelihood


def align_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(log-odds of chosen) - log sigmoid(-log-odds of rejected), shape [B].

    Args:
        chosen: average log-probability of a token of the chosen side, shape [B], at most 0.
        rejected: the same of the other side.
    """
    return -chosen - log_complement(rejected)


@dataclass(frozen=True, kw_only=True)
class ASFT(AbstractObjective):
    """ASFT over one chosen and one rejected view of token likelihoods, without a reference."""

    views: ClassVar[frozenset[str]] = CHOSEN_AND_REJECTED
    needs_reference: ClassVar[bool] = False
    must_know: ClassVar[Known] = "counts"
    reads: ClassVar[frozenset[Measure]] = TOKENS
    takes_strength: ClassVar[frozenset[Part]] = EITHER_ORDER

    odds_weight: OddsWeight = 0.1
    """Weight of the alignment term next to the negative log-likelihood per token of the chosen
    side."""

    def __call__(self, views: Views) -> LossOutput:
        return expected_loss(self.own(views), self._loss, known=self.must_know)

    def _loss(self, views: Views) -> LossOutput:
        chosen, rejected = views["chosen"].average, views["rejected"].average
        alignment = align_loss(chosen, rejected)
        supervised = negative_log_likelihood(views["chosen"])
        metrics = {
            **pair_metrics(chosen, rejected, views["chosen"].preference),
            "supervised_term": supervised.detach(),
            "preference_term": alignment.detach(),
        }
        return LossOutput(supervised + self.odds_weight * alignment, metrics)
