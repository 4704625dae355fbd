"""Smoothed preferences for diffusion models: the margin of DPO, scaled by how sure its label is.

With p the probability that the chosen side is preferred, the margin is multiplied by
z = scale (2p - 1): an undecided pair teaches nothing, and one whose label is probably wrong is
learnt the other way round. `data.strength.preference` says where p comes from; the authors take the
scores of PickScore as kind `gap`, with the range of the scores (0.1665803) as temperature.

Each pair has its own p. The authors' code takes that of the first pair of a micro-batch for all of
them, and makes the side that PickScore prefers the chosen one whatever people said; here labels
stay, and p may be below one half. At their beta of 5000 and scale of 10, a certain pair has a beta
of 50,000, which `note` says.

Source: Lu et al. 2025, arXiv:2506.02698, as in JaydenLyh/SmPO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from diffalign.objectives.base import AbstractObjective, LossOutput, Part, Views
from diffalign.objectives.dpo import dpo_loss
from diffalign.objectives.pair import CHOSEN_AND_REJECTED, Beta, pair_metrics
from diffalign.ranges import MoreThan


def smpo_loss(margin: Tensor, preference: Tensor, *, beta: float, scale: float) -> Tensor:
    """-log sigmoid(scale (2p - 1) beta margin).

    Args:
        margin: log-ratio of the chosen side minus that of the rejected side, shape [B].
        preference: probability p that the chosen side is the preferred one, [B].
        beta: pull towards the reference, in one over the units of the margin; greater than 0.
        scale: what a certain pair's margin is multiplied by; greater than 0.

    Returns:
        Shape [B]; log 2, without gradient, where p is one half.
    """
    return dpo_loss(scale * (2 * preference - 1) * margin, beta=beta)


@dataclass(frozen=True, kw_only=True)
class SmPO(AbstractObjective):
    """SmPO over one chosen and one rejected view whose pairs say how sure they are."""

    views: ClassVar[frozenset[str]] = CHOSEN_AND_REJECTED
    needs_reference: ClassVar[bool] = True
    takes_strength: ClassVar[frozenset[Part]] = frozenset({"preference", "weight"})
    needs_strength: ClassVar[frozenset[Part]] = frozenset({"preference"})

    beta: Beta
    """Pull towards the reference, in the units of `dpo.py`."""
    scale: Annotated[float, MoreThan(0, "at 0 nothing is learnt")] = 10.0
    """What the margin of a certain pair is multiplied by; 10 in the authors' code. At
    p = (1 + 1 / scale) / 2 the loss is that of DPO."""

    def __call__(self, views: Views) -> LossOutput:
        chosen, rejected = views["chosen"], views["rejected"]
        assert chosen.preference is not None, "the run was checked"
        ratios = chosen.log_ratio, rejected.log_ratio
        margin = ratios[0] - ratios[1]
        loss = smpo_loss(margin, chosen.preference, beta=self.beta, scale=self.scale)
        if chosen.weight is not None:
            loss = chosen.weight * loss
        rewards = self.beta * ratios[0], self.beta * ratios[1]
        metrics = pair_metrics(*rewards, chosen.preference)
        return LossOutput(loss, {**metrics, "preference": chosen.preference})

    def note(self) -> str:
        """The beta of a certain pair."""
        return f"the beta of a certain pair is {self.beta * self.scale:g}, that of a tie 0"
