"""Votes: the share of one side among them, under a Beta prior.

With v votes for the chosen side and w for the other, the probability that a further vote is for
the chosen one has the posterior Beta(v + prior, w + prior), whose mean is read: under Beta(1, 1),
3 to 1 give 2/3 and 30 to 0 give 31/32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from diffalign.data.strength.base import LABELS, AbstractPreference, Numbers, malformed
from diffalign.ranges import AtLeast


def beta_mean(won: float, lost: float) -> float:
    """Mean of Beta(won, lost)."""
    return won / (won + lost)


def beta_deviation(won: float, lost: float) -> float:
    """Standard deviation of Beta(won, lost)."""
    total = won + lost
    return math.sqrt(won * lost / (total + 1)) / total


@dataclass(frozen=True, kw_only=True)
class Votes(AbstractPreference):
    """The posterior mean of a Beta prior after the votes for either side."""

    counts: ClassVar[bool] = True

    of: str = LABELS
    """Which numbers are the votes: `labels`, by which the side that won is known, or a name under
    `columns`. Pick-a-Pic's labels 1, 0 and 0.5 are one vote, or half a vote for either side."""
    prior: Annotated[float, AtLeast(0, "it is a number of votes")] = 1.0
    """Votes that each side has before anybody voted, Beta(prior, prior): the more, the nearer to
    one half. At 0 the share itself is read, and a single vote is certain."""
    voters: Annotated[float, AtLeast(0)] | None = None
    """Where the two numbers are shares that add up to 1: of how many votes. Null takes them as they
    are, as one vote."""

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.of,)

    @property
    def knows_certainty(self) -> bool:
        return self.prior > 0

    def probability(self, numbers: Numbers) -> float:
        won, lost = self._posterior(numbers)
        return 0.5 if won == lost else beta_mean(won, lost)

    def certainty(self, numbers: Numbers) -> float:
        """In units of the prior: 1 where nobody voted."""
        before = beta_deviation(self.prior, self.prior)
        return before / beta_deviation(*self._posterior(numbers))

    def _posterior(self, numbers: Numbers) -> tuple[float, float]:
        votes = numbers[self.of]
        for number in votes:
            if number < 0 or not math.isfinite(number):
                raise malformed(
                    f"{self.of} are votes, and one of them is {number:g}: a count of votes is a "
                    f"number of at least 0. Scores go with strength.preference.kind gap"
                )
        scale = 1.0 if self.voters is None else self.voters
        return votes[0] * scale + self.prior, votes[1] * scale + self.prior

    def describe(self) -> str:
        return f"its probability is the mean of Beta({self.prior:g}, {self.prior:g}) after votes"
