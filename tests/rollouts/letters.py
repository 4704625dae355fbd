"""A reward that needs no truth: the share of vowels in a response, in tenths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffalign.data.responses.questions import Question
from diffalign.rewards.base import AbstractReward


@dataclass(frozen=True, kw_only=True)
class Vowels(AbstractReward):
    """Of questions that contain a word; NaN for a response without any character."""

    word: str = ""
    alike: bool = False
    """Whether all responses earn the same."""

    def obstacle(self, question: Question) -> str | None:
        return None if self.word in question.text else f"it does not say {self.word}"

    def score(self, question: Question, responses: Sequence[str]) -> list[float]:
        if self.alike:
            return [0.5] * len(responses)
        return [
            round(sum(map(text.count, "aeiouAEIOU")) / len(text), 1) if text else float("nan")
            for text in responses
        ]
