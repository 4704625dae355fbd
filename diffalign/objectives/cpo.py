"""Contrastive preference optimisation: DPO without its reference, held by fine-tuning.

Source: Xu et al. 2024, arXiv:2401.08417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from diffalign.objectives.base import Known, Likelihoods, LossOutput
from diffalign.objectives.dpo import dpo_loss
from diffalign.objectives.pair import AbstractPairObjective, Beta
from diffalign.objectives.sft import negative_log_likelihood
from diffalign.ranges import AtLeast


@dataclass(frozen=True, kw_only=True)
class CPO(AbstractPairObjective):
    """CPO over one chosen and one rejected view: DPO's loss on plain log-likelihoods, plus the
    negative log-likelihood of the chosen side per token."""

    needs_reference: ClassVar[bool] = False
    must_know: ClassVar[Known] = "counts"

    beta: Beta
    """Scale of the margin, in the units of `dpo.py`; 0.1 in the paper, for sums over tokens."""
    sft_weight: Annotated[float, AtLeast(0)] = 1.0
    """Weight of the negative log-likelihood; TRL's cpo_alpha."""

    def score(self, view: Likelihoods) -> Tensor:
        """The policy's own log-likelihood."""
        return view.policy

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        preference = dpo_loss(chosen.policy - rejected.policy, beta=self.beta)
        supervised = negative_log_likelihood(chosen)
        terms = {"supervised_term": supervised.detach(), "preference_term": preference.detach()}
        return LossOutput(preference + self.sft_weight * supervised, terms)
