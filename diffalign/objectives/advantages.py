"""Advantages: how much better a response is than the others to the same question.

They are what a policy gradient multiplies the log-probability of a response by. Rewards are rows of
a group, [G, k]: k responses to each of G questions, NaN for one that nobody could score. It is left
out of means and deviations, and its advantage is 0.

Sources: Shao et al. 2024 (GRPO), arXiv:2402.03300; Ahmadian et al. 2024 (RLOO), arXiv:2402.14740;
Liu et al. 2025 (scaling by the batch, or by nothing), arXiv:2503.20783 and TRL's GRPOTrainer, whose
numbers these are, the 1e-4 outside the root included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
"""What a difference to the mean of the group is divided by: the standard deviation of the group, of
all rewards that are there, or nothing."""
Combination = Literal["sum_then_normalize", "normalize_then_sum"]
"""How several rewards become one advantage: advantages of the weighted sum; or the weighted sum of
the advantages of each, divided by its own deviation over the batch (GDPO)."""

_ADDED = 1e-4
"""To a standard deviation, which may be 0."""
_ROUNDING = 1e-6
"""Numbers that differ by less, next to the larger one, are the same (float32 has 1.2e-7)."""


def group_advantages(rewards: Tensor, *, scale: Scale = "group") -> Tensor:
    """Rewards less the mean of their group, in units of a standard deviation (GRPO).

    Args:
        rewards: of k responses to each of G questions, [G, k], NaN where there is none.
        scale: the unit; deviations divide by n - 1.

    Returns:
        [G, k], 0 where there is no reward. A group of equal rewards has zeros.
    """
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (_deviations(rewards)[:, None] + _ADDED)
    elif scale == "batch":
        centred = centred / (_deviations(rewards.reshape(1, -1)) + _ADDED)
    return centred.nan_to_num(nan=0.0).masked_fill(~differing(rewards)[:, None], 0.0)


def leave_one_out(rewards: Tensor, *, normalize: bool = False) -> Tensor:
    """Rewards less the mean of the others of their group (RLOO).

    Args:
        rewards: see `group_advantages`; what a divergence costs is taken off before.
        normalize: subtract the mean over the batch, and divide by its standard deviation.

    Returns:
        [G, k], 0 where there is no reward, or none to compare it with, and in a group of equal
        rewards.
    """
    there = ~rewards.isnan()
    others = there.sum(dim=1, keepdim=True) - 1
    sums = rewards.nan_to_num(nan=0.0).sum(dim=1, keepdim=True)
    advantages = torch.where(others > 0, rewards - (sums - rewards) / others.clamp(min=1), 0.0)
    if normalize:
        advantages = torch.where(there, advantages, torch.nan)
        spread = _deviations(advantages.reshape(1, -1)) + _ADDED
        advantages = (advantages - advantages.nanmean()) / spread
    return advantages.nan_to_num(nan=0.0).masked_fill(~differing(rewards)[:, None], 0.0)


def differing(rewards: Tensor) -> Tensor:
    """Whether some rewards of a group differ by more than rounding.

    The mean of equal numbers may differ from them in its last bit, so that advantages do not tell.

    Args:
        rewards: see `group_advantages`.

    Returns:
        Bool [G].
    """
    there = ~rewards.isnan()
    highest = rewards.masked_fill(~there, -torch.inf).amax(dim=1)
    lowest = rewards.masked_fill(~there, torch.inf).amin(dim=1)
    size = torch.maximum(highest.abs(), lowest.abs())
    return there.any(dim=1) & (highest - lowest > _ROUNDING * size)


def weighted_sum(rewards: Tensor, weights: Sequence[float]) -> Tensor:
    """One reward of several: [R, G, k] to [G, k], NaN where one of them is missing."""
    return torch.einsum("rgk,r->gk", rewards, rewards.new_tensor(weights))


def advantages_of_several(
    rewards: Tensor,
    weights: Sequence[float],
    *,
    combine: Combination = "sum_then_normalize",
    scale: Scale = "group",
) -> Tensor:
    """Advantages by several rewards.

    Args:
        rewards: [R, G, k], see `group_advantages`.
        weights: of the R rewards.
        combine: which comes first.
        scale: of each group's differences.

    Returns:
        [G, k].
    """
    if combine == "sum_then_normalize":
        return group_advantages(weighted_sum(rewards, weights), scale=scale)
    each = torch.stack([group_advantages(reward, scale=scale) for reward in rewards])
    missing = rewards.isnan().any(dim=0)
    total = weighted_sum(each, weights).masked_fill(missing, torch.nan)
    spread = _deviations(total.reshape(1, -1)) + _ADDED
    found = ((total - total.nanmean()) / spread).nan_to_num(nan=0.0)
    equal = ~torch.stack([differing(reward) for reward in rewards]).any(dim=0)
    return found.masked_fill(equal[:, None], 0.0)


def _deviations(rows: Tensor) -> Tensor:
    """Standard deviation of each row, by n - 1, over what is there; 0 where that is one number."""
    there = ~rows.isnan()
    squares = (rows - rows.nanmean(dim=1, keepdim=True)).square().nan_to_num(nan=0.0)
    return (squares.sum(dim=1) / (there.sum(dim=1) - 1).clamp(min=1)).sqrt()
