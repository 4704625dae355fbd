"""Regression of the reward margin: the model's margin of a pair should be what a scorer says of it.

Where IPO has one gap for all pairs, each pair has a target here: the difference of two scores
(CoPG, REBEL) or of two calibrated ones (CaPO). So images that somebody scored are training data,
whoever sampled them, and there is no winner that the data must name.

With R the score and d the difference of the log-ratios, CoPG minimises (beta d - (R1 - R2))^2.
REBEL's (d - eta (R1 - R2))^2 is this with `divided_by_beta` and beta = 1 / eta, against the policy
that sampled as reference.

Sources: Flet-Berliac et al. 2024, arXiv:2406.19185 (CoPG); Gao et al. 2024, arXiv:2404.16767
(REBEL), as in ZhaolinGao/REBEL; Lee et al. 2025, arXiv:2502.02588 (CaPO).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.objectives.base import Likelihoods, LossOutput, Part
from diffalign.objectives.pair import AbstractPairObjective


def margin_regression_loss(margin: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """Squared distance of the reward margin from its target.

    Args:
        margin: log-ratio of the one side minus that of the other, shape [B].
        target: what beta times that should be, shape [B].
        beta: pull towards the reference, in one over the units of the margin; greater than 0.

    Returns:
        Shape [B]; 0 where beta * margin is the target.
    """
    return (beta * margin - target) ** 2


@dataclass(frozen=True, kw_only=True)
class MarginRegression(AbstractPairObjective):
    """Regression of the reward margin of each pair on the target that its data gives."""

    takes_strength: ClassVar[frozenset[Part]] = frozenset({"target", "weight"})
    needs_strength: ClassVar[frozenset[Part]] = frozenset({"target"})

    divided_by_beta: bool = False
    """Divide the loss by the square of beta: the margin itself is then regressed on the target
    over beta, as in REBEL, and the size of the gradient does not grow with beta."""

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        if chosen.target is None:
            raise ValueError(
                "margin_regression needs a target of each pair: give the data "
                "strength.target, such as {labels: 1.0}, or rounds of responses targets: true"
            )
        margin = chosen.log_ratio - rejected.log_ratio
        loss = margin_regression_loss(margin, chosen.target, beta=self.beta)
        error = (self.beta * margin - chosen.target).detach().abs()
        scaled = loss / self.beta**2 if self.divided_by_beta else loss
        return LossOutput(scaled, {"target": chosen.target, "target_error": error})
