"""Noise-contrastive alignment: as DPO, but the chosen side's own likelihood is held up.

DPO lowers both likelihoods if that increases the margin. Here each side also is alone: the chosen
one is sampled above its reference, and whatever is far above is sampled back.

Source: Chen et al. 2024, arXiv:2402.05369, for pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import Likelihoods, LossOutput
from diffalign.objectives.pair import AbstractPairObjective


def nca_loss(chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
    """One positive against two noise samples, of which the positive's own text is one.

    Args:
        chosen_reward: beta times log-ratio of the preferred side, shape [B].
        rejected_reward: the same for the other side, shape [B].

    Returns:
        Shape [B]; 2 log 2 where both rewards are 0.
    """
    sampled_back = (logsigmoid(-chosen_reward) + logsigmoid(-rejected_reward)) / 2
    return -logsigmoid(chosen_reward) - sampled_back


@dataclass(frozen=True, kw_only=True)
class NCA(AbstractPairObjective):
    """NCA over one chosen and one rejected view."""

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        return LossOutput(nca_loss(self.reward(chosen), self.reward(rejected)))
