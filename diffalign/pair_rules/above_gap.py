"""Every two images whose scores differ by enough."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

from diffalign.pair_rules.base import AbstractPairRule, Pair, ScoredGroup, Uniform, decided
from diffalign.ranges import AtLeast


@dataclass(frozen=True, kw_only=True)
class AboveGap(AbstractPairRule):
    """Every two images of a prompt, the larger the gap the earlier."""

    gap: Annotated[float, AtLeast(0)] = 0.0
    """Least difference of the scores, which it must exceed; in units of the score."""
    most: Annotated[int, AtLeast(1)] | None = None
    """How many pairs of a prompt are kept at most, those of the largest gaps; null for all."""

    def pairs(self, group: ScoredGroup, uniform: Uniform) -> list[Pair]:
        every = decided(group, list(combinations(range(len(group)), 2)))
        wide = [pair for pair in every if group.gap(pair) > self.gap]
        return sorted(wide, key=lambda pair: -group.gap(pair))[: self.most]

    def describe(self) -> str:
        most = "" if self.most is None else f", at most {self.most} of a prompt"
        return f"every two images of a prompt whose scores differ by more than {self.gap:g}{most}"
