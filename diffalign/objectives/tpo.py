"""Triple preference optimisation: learn a gold response while telling a chosen from a rejected one.

Not the Token Preference Optimization of vision-language models, nor the other methods of that
abbreviation. The form called TPO-L averages over tokens and has a target margin: give the
likelihood `reduction: mean` and this a gamma.

Source: Saeidi et al. 2024, arXiv:2405.16681.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from diffalign.objectives.base import AbstractObjective, Known, LossOutput, Part, Views
from diffalign.objectives.pair import EITHER_ORDER, Beta, expected_loss, pair_metrics
from diffalign.objectives.sft import negative_log_likelihood
from diffalign.objectives.simpo import simpo_loss
from diffalign.ranges import AtLeast


@dataclass(frozen=True, kw_only=True)
class TriplePO(AbstractObjective):
    """A preference of chosen over rejected, and the negative log-likelihood per token of gold;
    without a reference."""

    views: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected", "gold"})
    needs_reference: ClassVar[bool] = False
    must_know: ClassVar[Known] = "counts"
    takes_strength: ClassVar[frozenset[Part]] = EITHER_ORDER

    beta: Beta
    """Scale of the margin; 0.01 in the paper, for sums over tokens."""
    gamma: Annotated[float, AtLeast(0)] = 0.0
    """Target of the reward margin; that of TPO-L, 0 in TPO."""
    sft_weight: Annotated[float, AtLeast(0)] = 1.0
    """Weight of the gold response; alpha in the paper."""

    def __call__(self, views: Views) -> LossOutput:
        return expected_loss(self.own(views), self._loss, known=self.must_know)

    def _loss(self, views: Views) -> LossOutput:
        chosen, rejected = views["chosen"].policy, views["rejected"].policy
        preference = simpo_loss(chosen - rejected, beta=self.beta, gamma=self.gamma)
        supervised = negative_log_likelihood(views["gold"])
        metrics = {
            **pair_metrics(self.beta * chosen, self.beta * rejected, views["chosen"].preference),
            "supervised_term": supervised.detach(),
            "preference_term": preference.detach(),
        }
        return LossOutput(preference + self.sft_weight * supervised, metrics)
