"""Right or wrong: questions that the data set answers with yes or no, as POPE asks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from diffalign.data.responses.questions import Question
from diffalign.ranges import Between
from diffalign.response_rules.yes_no import says
from diffalign.rewards.base import AbstractReward


@dataclass(frozen=True, kw_only=True)
class YesNo(AbstractReward):
    """1 for a response that says what the response of the data set says, and 0 for any other.

    A response that says neither yes nor no, or both, is wrong: POPE's own parsing takes it for a
    yes, which a policy that is rewarded by it would learn.
    """

    denied: Annotated[float, Between(-10, 0)] = 0.0
    """For a no where yes is right. Below 0, affirming what is there counts for more than denying
    what is not; `rollouts.scale` has to be batch or none, or each group is brought to one spread.
    Ours."""

    def obstacle(self, question: Question) -> str | None:
        if question.response is not None and says(question.response) is not None:
            return None
        return f"its response says neither yes nor no: {question.response!r}"

    def score(self, question: Question, responses: Sequence[str]) -> list[float]:
        truth = says(question.response or "")
        denied = self.denied if truth == "yes" else 0.0
        said = map(_said, responses)
        return [1.0 if now == truth else denied if now == "no" else 0.0 for now in said]


def _said(response: str) -> str | None:
    """What is said before the first full stop; None where that is both."""
    words = set(response.partition(".")[0].replace(",", "").lower().split())
    return None if "yes" in words and words & {"no", "not"} else says(response)
