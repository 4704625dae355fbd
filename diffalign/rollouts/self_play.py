"""SPIN: the policy learns to tell the data's responses from those that it writes itself.

Every visit pairs the response of the data set, which is chosen, with responses of the policy that
the round began with. Nothing scores them, and the reference is that policy.

Source: Chen et al. 2024, arXiv:2401.01335.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from diffalign.data.responses.questions import Question
from diffalign.data.source import AbstractSource
from diffalign.ranges import AtLeast
from diffalign.rewards.base import AbstractReward
from diffalign.rollouts.base import ReferenceRule, RunContext
from diffalign.rollouts.response_collector import ResponseCollector
from diffalign.rollouts.response_rounds import AbstractResponseRollouts, Row, Rows, ScoredResponses
from diffalign.rollouts.rounds import Rounds


@dataclass(frozen=True, kw_only=True)
class SelfPlay(AbstractResponseRollouts):
    """Rounds of the data's responses against the policy's own."""

    views: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected"})

    reference: ReferenceRule = "latest"
    """As published, the policy that the round began with."""
    rewards: tuple[AbstractReward, ...] = ()
    """None are read here; `watch` shows what rewards make of the policy."""
    responses_per_question: Annotated[int, AtLeast(1)] = 1
    """Own responses of each question, each a pair; 1 in the authors' code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rewards:
            raise ValueError(
                "rewards is given, and self-play scores nothing: give them as watch to look at "
                "them, or take kind response_pairs"
            )

    def open(self, run: RunContext) -> AbstractSource:
        return Rounds(self, ResponseCollector(self, run), run)

    def describe(self) -> str:
        return (
            f"rounds of {self.questions_per_round} questions, the data's response to each against "
            f"{self.responses_per_question} of the policy's own"
        )

    def data_responses_at(self, seed: int) -> tuple[str, ...]:
        return ("chosen",)

    def obstacle(self, question: Question) -> str | None:
        return None if question.response else "the data set has no response to it"

    def rows(self, groups: Sequence[ScoredResponses], seed: int) -> Rows:
        different = [
            (group, place)
            for group in groups
            for place, text in enumerate(group.texts)
            if text and text != group.response
        ]
        written = sum(len(group.texts) for group in groups)
        equal = written - len(different)
        return Rows(
            rows=[
                Row(
                    sample_id=f"{group.question_id}/{place}",
                    visit=group.visit,
                    responses={"chosen": None, "rejected": place},
                )
                for group, place in different
            ],
            figures={"equal_share": equal / written},
            skipped={"own responses that are those of the data, or empty": equal},
            sentence=f"{len(different)} of {written} own responses differ from the data's",
        )
