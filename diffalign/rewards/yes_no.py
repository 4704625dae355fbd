"""Right or wrong: questions that the data set answers with yes or no, as POPE asks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffalign.data.responses.questions import Question
from diffalign.response_rules.yes_no import says
from diffalign.rewards.base import AbstractReward


@dataclass(frozen=True, kw_only=True)
class YesNo(AbstractReward):
    """1 for a response that says what the response of the data set says, and 0 for any other.

    A response that says neither yes nor no, or both, is wrong: POPE's own parsing takes it for a
    yes, which a policy that is rewarded by it would learn.
    """

    def obstacle(self, question: Question) -> str | None:
        if question.response is not None and says(question.response) is not None:
            return None
        return f"its response says neither yes nor no: {question.response!r}"

    def score(self, question: Question, responses: Sequence[str]) -> list[float]:
        truth = says(question.response or "")
        return [float(_said(response) == truth) for response in responses]


def _said(response: str) -> str | None:
    """What is said before the first full stop; None where that is both."""
    words = set(response.partition(".")[0].replace(",", "").lower().split())
    return None if "yes" in words and words & {"no", "not"} else says(response)
