"""Anchored preference optimisation: say whether the chosen responses are worth learning.

`zero` raises the chosen side and lowers the rejected one, for responses better than the model's
own. `down` lowers both, the rejected one more, for responses that are worse than what the model
gives.

Source: D'Oosterlinck et al. 2024, arXiv:2408.06266.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.objectives.base import Likelihoods, LossOutput
from diffalign.objectives.pair import AbstractPairObjective

Form = Literal["zero", "down"]


def apo_loss(chosen_reward: Tensor, rejected_reward: Tensor, *, form: Form) -> Tensor:
    """Sigmoids of what should rise and of what should fall.

    Args:
        chosen_reward: beta times log-ratio of the preferred side, shape [B].
        rejected_reward: the same for the other side, shape [B].
        form: `zero` or `down`.

    Returns:
        Shape [B], between 0 and 2; 1 where both rewards are 0.
    """
    if form == "zero":
        return torch.sigmoid(-chosen_reward) + torch.sigmoid(rejected_reward)
    return torch.sigmoid(chosen_reward) + torch.sigmoid(rejected_reward - chosen_reward)


@dataclass(frozen=True, kw_only=True)
class APO(AbstractPairObjective):
    """APO over one chosen and one rejected view."""

    form: Form = "zero"
    """`zero` where chosen responses beat the model's own, `down` where they are worse."""

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        loss = apo_loss(self.reward(chosen), self.reward(rejected), form=self.form)
        return LossOutput(loss)
