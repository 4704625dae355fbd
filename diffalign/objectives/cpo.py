"""Contrastive preference optimisation: DPO without its reference, held by fine-tuning.

Source: Xu et al. 2024, arXiv:2401.08417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.objectives.base import (
    AbstractObjective,
    Known,
    LossOutput,
    Views,
    check_beta,
    pair_metrics,
)
from diffalign.objectives.dpo import dpo_loss
from diffalign.objectives.sft import negative_log_likelihood


@dataclass(frozen=True, kw_only=True)
class CPO(AbstractObjective):
    """CPO over one chosen and one rejected view: DPO's loss on plain log-likelihoods, plus the
    negative log-likelihood of the chosen side per token."""

    views: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected"})
    needs_reference: ClassVar[bool] = False
    must_know: ClassVar[Known] = "counts"

    beta: float
    """Scale of the margin, in the units of `dpo.py`; 0.1 in the paper, for sums over tokens."""
    sft_weight: float = 1.0
    """Weight of the negative log-likelihood; TRL's cpo_alpha."""

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if self.sft_weight < 0:
            raise ValueError(f"sft_weight must be at least 0, got {self.sft_weight}")

    def __call__(self, views: Views) -> LossOutput:
        chosen, rejected = views["chosen"].policy, views["rejected"].policy
        preference = dpo_loss(chosen - rejected, beta=self.beta)
        supervised = negative_log_likelihood(views["chosen"])
        metrics = {
            **pair_metrics(self.beta * chosen, self.beta * rejected),
            "supervised_term": supervised.detach(),
            "preference_term": preference.detach(),
        }
        return LossOutput(preference + self.sft_weight * supervised, metrics)
