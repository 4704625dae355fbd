"""An anchor: hold the reward of one view above a value, or below it.

DPO is content if both likelihoods fall, the rejected one faster. mDPO adds that the chosen
response's must not fall: a term of a `weighted_sum`.

Source: Wang et al. 2024, arXiv:2406.11839 (mDPO).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import AbstractObjective, LossOutput, Views
from diffalign.objectives.pair import Beta

Direction = Literal["up", "down"]


def anchor_loss(reward: Tensor, *, delta: float, direction: Direction) -> Tensor:
    """Negative log-probability that a reward lies on the right side of delta.

    Args:
        reward: beta times log-ratio, shape [B].
        delta: the value to stay above or below.
        direction: `up` for above, `down` for below.

    Returns:
        Shape [B]; log 2 at delta.
    """
    excess = reward - delta
    return -logsigmoid(excess if direction == "up" else -excess)


@dataclass(frozen=True, kw_only=True)
class Anchor(AbstractObjective):
    """An anchor on the chosen view, or under the rejected one."""

    needs_reference: ClassVar[bool] = True

    beta: Beta
    """Scale of the reward, in the units of `dpo.py`."""
    delta: float = 0.0
    """The reward to stay above, or below; 0 in the paper, what the reference has."""
    direction: Direction = "up"
    """`up` keeps the view `chosen` above delta, `down` the view `rejected` below it."""

    @property
    def _view(self) -> str:
        return "chosen" if self.direction == "up" else "rejected"

    @property
    def views(self) -> frozenset[str]:
        """The one view that is held."""
        return frozenset({self._view})

    def __call__(self, views: Views) -> LossOutput:
        reward = self.beta * views[self._view].log_ratio
        loss = anchor_loss(reward, delta=self.delta, direction=self.direction)
        return LossOutput(loss, {f"{self._view}_reward": reward.detach()})
