"""The contract of a rule that makes pairs of scored images."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any, ClassVar

from diffalign.ranges import Ranged
from diffalign.seeding import unit_interval

Pair = tuple[int, int]
"""Places of the preferred image and of the other one in their group."""


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """The images of one prompt, N of them, with their scores; higher is better."""

    prompt: str
    scores: tuple[float, ...]
    """By which one image is preferred to another, [N]."""
    by_scorer: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Scorer -> its scores, [N], for rules that read several."""

    def __len__(self) -> int:
        return len(self.scores)

    def gap(self, pair: Pair) -> float:
        """How much larger the score of the preferred image is."""
        return self.scores[pair[0]] - self.scores[pair[1]]

    @cached_property
    def ranked(self) -> tuple[int, ...]:
        """Places from the highest score to the lowest; equal ones in their order."""
        return tuple(sorted(range(len(self)), key=lambda place: -self.scores[place]))


@dataclass(frozen=True, kw_only=True)
class LabelledPair:
    """Two images of a group about which people were asked."""

    group: ScoredGroup
    places: Pair
    """In either order."""
    label: float
    """Probability that the first of the two is the better one, in [0, 1]."""


Uniform = Callable[[], float]
"""The next random number in [0, 1)."""


@dataclass(frozen=True, kw_only=True)
class AbstractPairRule(Ranged, abc.ABC):
    """Which pairs are made of the images of a prompt; its module is its `kind`."""

    reads_all_scorers: ClassVar[bool] = False
    """Whether it compares images by every scorer, rather than by one number."""
    needs_labels: ClassVar[bool] = False
    """Whether pairs that people labelled choose what it does: see `fitted`."""

    @abc.abstractmethod
    def pairs(self, group: ScoredGroup, uniform: Uniform) -> list[Pair]:
        """The pairs of a group, without those of equal score.

        Args:
            group: of two images or more.
            uniform: random numbers, the same for the same group.
        """

    def fitted(self, labelled: Sequence[LabelledPair]) -> Fitted:
        """The rule that labelled pairs choose; itself where it needs none.

        Raises:
            DataError: too few of them say anything.
        """
        return Fitted(rule=self)

    @abc.abstractmethod
    def describe(self) -> str:
        """The rule as a noun phrase."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A rule that can make pairs, and how it was chosen."""

    rule: AbstractPairRule
    findings: Mapping[str, Any] = field(default_factory=dict)
    """What labelled pairs said, for the provenance of the pairs made: plain JSON values."""


def uniforms(*parts: int | str) -> Uniform:
    """Random numbers in [0, 1), the same sequence for the same parts."""
    numbers = count()
    return lambda: unit_interval(*parts, next(numbers))


def decided(group: ScoredGroup, pairs: Sequence[Pair]) -> list[Pair]:
    """Those of some pairs whose scores differ, the better image first, each once."""
    turned = [pair if group.gap(pair) > 0 else pair[::-1] for pair in pairs]
    return [pair for pair in dict.fromkeys(turned) if group.gap(pair) > 0]
