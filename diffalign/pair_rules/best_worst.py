"""The best image of a prompt against the worst."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.pair_rules.base import AbstractPairRule, Pair, ScoredGroup, Uniform, decided


@dataclass(frozen=True, kw_only=True)
class BestWorst(AbstractPairRule):
    """One pair a prompt, of the highest score and the lowest; of equal ones the first counts."""

    def pairs(self, group: ScoredGroup, uniform: Uniform) -> list[Pair]:
        return decided(group, [(group.ranked[0], group.ranked[-1])])

    def describe(self) -> str:
        return "the best image of each prompt against the worst"
