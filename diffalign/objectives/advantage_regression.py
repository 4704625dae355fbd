"""Regression of the reward of each response on its advantage: no side of a pair, no ratio to clip.

With rounds of `response_advantages` whose reward is a win rate and whose `scale` is none, the
advantage is the win rate less one half, the mean of all who play each other. Against the policy
that the round began with, and with `divided_by_beta`, this is SPPO as its paper states it, with
every response that was sampled: (log-ratio - (win rate - 1/2) / beta)^2, where eta is one over
beta. The authors' code takes two responses of a question, and the mean of both; `sppo` is of a pair
whose sides have one probability between them.

Source: Wu et al. 2024, arXiv:2405.00675, equation 4.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.objectives.base import AbstractObjective, LossOutput, Part, Views
from diffalign.objectives.margin_regression import margin_regression_loss
from diffalign.objectives.pair import Beta


@dataclass(frozen=True, kw_only=True)
class AdvantageRegression(AbstractObjective):
    """Squared distance of beta times the log-ratio of the view `sampled` from its advantage."""

    views: ClassVar[frozenset[str]] = frozenset({"sampled"})
    needs_reference: ClassVar[bool] = True
    takes_strength: ClassVar[frozenset[Part]] = frozenset({"advantage"})
    needs_strength: ClassVar[frozenset[Part]] = frozenset({"advantage"})

    beta: Beta
    """Pull towards the reference, in one over the units of the log-ratio; 0.001 in SPPO, for sums
    over tokens."""
    divided_by_beta: bool = False
    """Divide the loss by the square of beta, as in SPPO: the size of the gradient does not grow
    with beta."""

    def __call__(self, views: Views) -> LossOutput:
        view = views["sampled"]
        assert view.advantage is not None, "the run was checked"
        loss = margin_regression_loss(view.log_ratio, view.advantage, beta=self.beta)
        reward = (self.beta * view.log_ratio).detach()
        error = (reward - view.advantage).abs()
        scaled = loss / self.beta**2 if self.divided_by_beta else loss
        return LossOutput(
            scaled, {"reward": reward, "advantage": view.advantage, "advantage_error": error}
        )
