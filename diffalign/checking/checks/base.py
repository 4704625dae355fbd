"""Checks of a data set: the contract, and what one of them finds."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from diffalign.checking.rows import Examined, Kind, SeenAt
from diffalign.intervals import exact_interval
from diffalign.ranges import Ranged

Severity = Literal["harmful", "doubtful"]
"""`harmful`: training on it does damage or stops. `doubtful`: it may, which a person can tell."""

_NAMED = 3
"""Rows that a sentence names."""


@dataclass(frozen=True)
class Share:
    """A part of a whole, with its exact interval."""

    count: int
    of: int
    """Independent trials; where there are none, nothing is known of the share."""
    low: float
    high: float

    @classmethod
    def of_trials(cls, count: int, of: int, confidence: float) -> Share:
        """So many successes in so many independent trials."""
        low, high = exact_interval(count, of, confidence) if of else (0.0, 1.0)
        return cls(count, of, low, high)

    @property
    def value(self) -> float:
        """From 0 to 1; not a number where there were no trials."""
        return self.count / self.of if self.of else float("nan")

    @property
    def rest(self) -> Share:
        """The other part of the whole."""
        return Share(self.of - self.count, self.of, 1 - self.high, 1 - self.low)

    @property
    def larger(self) -> Share:
        """This part of the whole, or the other one where that is more."""
        return self if 2 * self.count >= self.of else self.rest

    def excludes(self, share: float, *, by: float = 0.0) -> bool:
        """Whether the interval lies wholly on one side of a share, and the value `by` from it."""
        outside = self.low > share or self.high < share
        return outside and abs(self.value - share) >= by - 1e-12

    def __str__(self) -> str:
        if not self.of:
            return "of none"
        ends = f"{100 * self.low:.1f} to {100 * self.high:.1f}"
        return f"{100 * self.value:.1f} % ({ends} %) of {self.of:,}"


Figure = int | float | str | Share
"""A number, a share with its interval, or a word."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong with a data set."""

    name: str
    """For programs, such as `identical_sides`."""
    severity: Severity
    count: int
    """How many there are, of what `what` says."""
    what: str
    """What was found, with its number: the start of a sentence."""
    harm: str
    """What it does to training."""
    advice: str
    """What to do next."""
    share: Share | None = None
    """The share that decides it, to be seen next to one half."""
    rows: Sequence[str] = ()
    """Names of all rows that it is about."""
    examples: Sequence[Sequence[SeenAt]] = ()
    """Images to show: those of one example belong together."""

    @property
    def sentence(self) -> str:
        """The finding, whole."""
        named = list(dict.fromkeys(self.rows))[:_NAMED]
        such = f", such as {', '.join(named)}" if named else ""
        return f"{self.what}{such}: {self.harm}; {self.advice}."


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one check."""

    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Numbers worth knowing, whether they are harmful or not."""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Title -> histogram."""
    findings: Sequence[Finding] = ()
    passed_over: str = ""
    """Why nothing, or not all, was looked at."""


@dataclass(frozen=True, kw_only=True)
class AbstractCheck(Ranged, abc.ABC):
    """One check of a data set. Its module is its `kind`, and its fields are its thresholds."""

    title: ClassVar[str]
    """What it looks at, as a heading."""
    of: ClassVar[frozenset[Kind]] = frozenset({"images", "responses"})
    """What data it can look at."""

    @classmethod
    def reads(cls, column: str) -> bool:
        """Whether it wants a column of this name, next to those that make up a preference."""
        return False

    @abc.abstractmethod
    def look(self, data: Examined) -> Outcome:
        """Everything that it has to say of a data set."""


def counted(count: int, noun: str) -> str:
    """A number with its noun, which is given in the plural and ends in s: `4 rows`, `1 row`."""
    return f"{count:,} {noun[:-1] if count == 1 else noun}"


def of_all(count: int, of: int, noun: str, verb: str) -> str:
    """The start of a sentence: `4 of 1,000 rows show`, `1 of 1,000 rows shows`.

    Args:
        count: how many.
        of: how many there are in all.
        noun: in the plural.
        verb: in the plural; `are` and `have` are known.
    """
    singular = {"are": "is", "have": "has"}.get(verb, f"{verb}s")
    return f"{count:,} of {of:,} {noun} {singular if count == 1 else verb}"
