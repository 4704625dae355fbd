"""Binary classifier optimisation on pairs: each side is classified alone, with a threshold of 0.

What TRL calls `bco_pair`, the quality term of MPO. The threshold that its paper shifts by the mean
reward is the objective `bco`.

Source: Jung et al. 2024, arXiv:2404.04656, with delta 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import Likelihoods, LossOutput
from diffalign.objectives.pair import AbstractPairObjective


def bco_loss(chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
    """Cross-entropy of a classifier of both sides, summed over them.

    Args:
        chosen_reward: beta times log-ratio of the preferred side, less the threshold, shape [B].
        rejected_reward: the same for the other side.

    Returns:
        Shape [B]; 2 log 2 at the threshold.
    """
    return -logsigmoid(chosen_reward) - logsigmoid(-rejected_reward)


@dataclass(frozen=True, kw_only=True)
class PairedBCO(AbstractPairObjective):
    """BCO over one chosen and one rejected view with a threshold of 0; the sum of both sides."""

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        return LossOutput(bco_loss(self.reward(chosen), self.reward(rejected)))
