"""Simple preference optimisation: the average log-likelihood is the reward, and no reference.

Averages over tokens keep long responses from winning by length or losing by it, and the target
margin asks for more than being right.

Source: Meng, Xia and Chen 2024, arXiv:2405.14734, eq. 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import Likelihoods, LossOutput
from diffalign.objectives.pair import AbstractPairObjective, Beta
from diffalign.ranges import AtLeast


def simpo_loss(margin: Tensor, *, beta: float, gamma: float) -> Tensor:
    """DPO's loss on a margin of averages, less a target.

    Args:
        margin: average log-likelihood per token of the chosen side minus that of the rejected
            side, shape [B].
        beta: scale of the rewards; greater than 0.
        gamma: how much larger the chosen side's reward should be.

    Returns:
        Shape [B]; log 2 where beta * margin == gamma.
    """
    return -logsigmoid(beta * margin - gamma)


@dataclass(frozen=True, kw_only=True)
class SimPO(AbstractPairObjective):
    """SimPO over one chosen and one rejected view, without a reference."""

    needs_reference: ClassVar[bool] = False

    beta: Beta
    """Scale of the rewards; 2 to 2.5 in the paper, on averages over tokens."""
    gamma: Annotated[
        float, AtLeast(0, "it is how far the chosen side should lie above the rejected one")
    ]
    """Target of the reward margin; 0.3 to 0.6 times beta in the paper."""

    def score(self, view: Likelihoods) -> Tensor:
        """Log-likelihood per token."""
        return view.average

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        margin = self.score(chosen) - self.score(rejected)
        return LossOutput(simpo_loss(margin, beta=self.beta, gamma=self.gamma))
