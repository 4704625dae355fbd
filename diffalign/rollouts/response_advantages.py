"""GRPO and RLOO: responses are better or worse than the others to the same question.

Each sampled response is a row with its advantage, by which the objective multiplies its
log-probability. Where a round trains more than one optimiser step, the log-probabilities of the
tokens under the policy that sampled go with it.

Sources: Shao et al. 2024 (GRPO), arXiv:2402.03300; Ahmadian et al. 2024 (RLOO), arXiv:2402.14740.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.data.source import AbstractSource
from diffalign.objectives.advantages import (
    Combination,
    Scale,
    advantages_of_several,
    leave_one_out,
    weighted_sum,
)
from diffalign.rollouts.base import RunContext
from diffalign.rollouts.response_collector import ResponseCollector
from diffalign.rollouts.response_rounds import (
    SAMPLED,
    AbstractResponseRollouts,
    Row,
    Rows,
    ScoredResponses,
)
from diffalign.rollouts.rounds import Rounds


@dataclass(frozen=True, kw_only=True)
class ResponseAdvantages(AbstractResponseRollouts):
    """Rounds of responses with advantages."""

    views: ClassVar[frozenset[str]] = frozenset({SAMPLED})

    baseline: Literal["mean", "others"] = "mean"
    """What a reward is compared with: the mean of its group (GRPO) or of the others in it
    (RLOO)."""
    scale: Scale | None = None
    """What the difference is divided by: the standard deviation of the `group` (GRPO), or of the
    `batch`, which is the round, or `none`. Null is group for `mean` and none for `others`."""
    combine: Combination = "sum_then_normalize"
    """Of several rewards: advantages of their sum, or the sum of their advantages (GDPO)."""
    equal_groups: Literal["keep", "drop"] = "keep"
    """Groups whose rewards are all the same teach nothing. They are rows of advantage 0 (`keep`,
    as in GRPO), or left out, so that a step is made of those that differ (`drop`, DAPO's dynamic
    sampling, arXiv:2503.14476)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_no_comparison()
        if self.temperature != 1:
            raise ValueError(
                f"temperature is {self.temperature:g}, and responses sampled at another than 1 "
                f"are not those of the policy that is trained: leave it at 1"
            )
        if self.baseline == "others" and self.scale == "group":
            raise ValueError(
                "scale is group, and baseline others (RLOO) is scaled by the batch or by nothing: "
                "set scale to batch or none, or baseline to mean"
            )
        if self.baseline == "others" and self.combine != "sum_then_normalize":
            raise ValueError(
                f"combine is {self.combine}, which is of baseline mean: set it to "
                f"sum_then_normalize"
            )

    @property
    def strength(self) -> Mapping[str, str]:
        return {"advantage": f"kind is {__name__.rpartition('.')[2]}"}

    def open(self, run: RunContext) -> AbstractSource:
        return Rounds(self, ResponseCollector(self, run), run)

    def further_lines(self, samples_per_step: int) -> list[str]:
        steps = self.questions_per_round * self.responses_per_question // samples_per_step
        if steps <= 1:
            return ["every optimiser step trains on responses of the policy that it moves"]
        return [
            f"a round trains at most {steps} optimiser steps; from the second on a loss that clips "
            f"compares the policy, token by token, with the one that sampled"
        ]

    def remembers(self, samples_per_step: int) -> bool:
        return self.questions_per_round * self.responses_per_question > samples_per_step

    def rows(self, groups: Sequence[ScoredResponses], seed: int) -> Rows:
        names = self.reward_names
        rewards = torch.tensor([group.vector(names) for group in groups], dtype=torch.float64)
        rewards = rewards.transpose(0, 1)  # [R, G, k]
        advantages = self.advantages(rewards)
        differ = (advantages != 0).any(dim=1).tolist()
        kept = [
            place
            for place, differs in enumerate(differ)
            if differs or (self.equal_groups == "keep" and any(differ))
        ]
        equal = len(groups) - sum(differ)
        return Rows(
            rows=[
                Row(
                    sample_id=f"{groups[place].question_id}/{response}",
                    visit=groups[place].visit,
                    responses={SAMPLED: response},
                    advantage=advantage,
                )
                for place in kept
                for response, advantage in enumerate(advantages[place].tolist())
            ],
            figures={
                "reward": weighted_sum(rewards, self.weights).nanmean().item(),
                "differing_share": sum(differ) / len(groups),
            },
            skipped={"questions whose responses all earned the same": equal},
            sentence=f"{sum(differ)} of {len(groups)} questions with differing rewards",
        )

    def advantages(self, rewards: Tensor) -> Tensor:
        """Of rewards [R, G, k], NaN where there is none: [G, k]."""
        if self.baseline == "others":
            total = weighted_sum(rewards, self.weights)
            return leave_one_out(total, normalize=self.scale == "batch")
        return advantages_of_several(
            rewards, self.weights, combine=self.combine, scale=self.scale or "group"
        )
