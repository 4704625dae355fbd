"""Images that nothing beats against images that beat nothing, by several scorers at once.

The fronts are those of `data.group_pairs: fronts`.

Source: the pair selection of CaPO, arXiv:2502.02588.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from diffalign.data.pairs.groups import pareto_fronts
from diffalign.pair_rules.base import AbstractPairRule, Pair, ScoredGroup, Uniform


@dataclass(frozen=True, kw_only=True)
class Fronts(AbstractPairRule):
    """Each image of the first Pareto front with each of the last, where it is no worse under any
    scorer and better under one."""

    reads_all_scorers: ClassVar[bool] = True

    def pairs(self, group: ScoredGroup, uniform: Uniform) -> list[Pair]:
        points = list(zip(*group.by_scorer.values(), strict=True))

        def no_worse(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
            return all(a >= b for a, b in zip(one, other, strict=True))

        best, worst = pareto_fronts(points)
        return [
            (i, j)
            for i, j in product(best, worst)
            if points[i] != points[j] and no_worse(points[i], points[j])
        ]

    def describe(self) -> str:
        return "each image that nothing beats under all scorers against each that beats nothing"
