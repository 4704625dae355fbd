"""Win rates by another reward: the higher of two is preferred, the more surely the larger the gap.

Source: Bradley and Terry 1952; SPPO (Wu et al. 2024, arXiv:2405.00675) makes probabilities of the
scores of its judge this way, at a temperature of 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from diffalign.data.responses.questions import Question
from diffalign.data.strength.gap import sigmoid
from diffalign.pair_judges.base import every_pair
from diffalign.ranges import MoreThan
from diffalign.rewards.base import AbstractReward, AbstractWinRate, Match


@dataclass(frozen=True, kw_only=True)
class WinRate(AbstractWinRate):
    """Who wins is a matter of what each response earns: sigmoid(gap / temperature)."""

    reward: AbstractReward
    """What each response earns."""
    temperature: Annotated[float, MoreThan(0)] = 1.0
    """The gap at which the odds are e to 1; 1 in SPPO. A gap of no more than 1, as `yes_no` and
    `chair` have, wants less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.reward, AbstractWinRate):
            raise ValueError(
                "reward compares responses itself: name it as the reward of the rollouts"
            )

    def check(self) -> None:
        self.reward.check()

    @property
    def fingerprint(self) -> str:
        return self.reward.fingerprint

    def to(self, device: torch.device) -> None:
        self.reward.to(device)

    def obstacle(self, question: Question) -> str | None:
        return self.reward.obstacle(question)

    def preferences(self, question: Question, responses: Sequence[str]) -> Mapping[Match, float]:
        earned = self.reward.score(question, responses)
        return {
            (i, j): sigmoid((earned[i] - earned[j]) / self.temperature)
            for i, j in every_pair(len(responses))
            if math.isfinite(earned[i]) and math.isfinite(earned[j])
        }
