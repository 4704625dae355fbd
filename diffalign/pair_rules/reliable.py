"""The rule among several whose pairs the score tells most reliably.

PF-PPO trains on those ranks of a group at which the reward can be trusted, and finds them by the
coefficient of determination between reward and truth on what each rule keeps. Here the truth are
pairs that people labelled: of each rule, those labelled pairs count that it would make itself.

Source: Shen and Zhang 2024, arXiv:2409.06957, section 3 (best of N, best-random, best-worst).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from diffalign import components
from diffalign.errors import DataError
from diffalign.pair_rules.above_gap import AboveGap
from diffalign.pair_rules.base import (
    AbstractPairRule,
    Fitted,
    LabelledPair,
    Pair,
    ScoredGroup,
    Uniform,
    uniforms,
)
from diffalign.pair_rules.best_random import BestRandom
from diffalign.pair_rules.best_worst import BestWorst
from diffalign.ranges import AtLeast


@dataclass(frozen=True, kw_only=True)
class Reliable(AbstractPairRule):
    """The rule with the highest R^2 between gap and label; of equal ones the first."""

    needs_labels: ClassVar[bool] = True

    rules: tuple[AbstractPairRule, ...] = field(
        default_factory=lambda: (BestWorst(), BestRandom(), AboveGap())
    )
    """What is chosen from."""
    least_labelled: Annotated[int, AtLeast(2)] = 30
    """Labelled pairs that a rule must make to be chosen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.rules) < 2 or any(isinstance(rule, Reliable) for rule in self.rules):
            raise ValueError("rules are two or more to choose from, and none of them is reliable")

    def pairs(self, group: ScoredGroup, uniform: Uniform) -> list[Pair]:
        raise AssertionError("labelled pairs choose the rule first: `fitted`")

    def fitted(self, labelled: Sequence[LabelledPair]) -> Fitted:
        measured = [self._measure(rule, labelled) for rule in self.rules]
        known = [n for n, found in enumerate(measured) if found["r_squared"] is not None]
        if not known:
            most = max(found["pairs"] for found in measured)
            raise DataError(
                f"rule reliable is chosen by labelled pairs, and no rule makes more than {most} of "
                f"those {len(labelled)} that are labelled (it takes {self.least_labelled}): label "
                f"more pairs of the same prompts, lower rule.least_labelled, or take a rule such "
                f"as best_worst"
            )
        best = max(known, key=lambda n: measured[n]["r_squared"])
        return Fitted(rule=self.rules[best], findings={"rules": measured, "chosen": best})

    def _measure(self, rule: AbstractPairRule, labelled: Sequence[LabelledPair]) -> dict[str, Any]:
        kept = [pair for pair in labelled if _makes(rule, pair)]
        enough = len(kept) >= self.least_labelled
        found = r_squared(
            [each.group.gap(each.places) for each in kept], [each.label for each in kept]
        )
        return {
            "kind": components.kind_of(rule),
            "pairs": len(kept),
            "r_squared": found if enough else None,
        }

    def describe(self) -> str:
        return "the rule whose pairs the score tells most reliably"


def _makes(rule: AbstractPairRule, labelled: LabelledPair) -> bool:
    """Whether a rule would make a labelled pair of its group."""
    made = rule.pairs(labelled.group, uniforms("reliable", labelled.group.prompt))
    return labelled.places in made or labelled.places[::-1] in made


def r_squared(gaps: Sequence[float], labels: Sequence[float]) -> float | None:
    """Share of the variance of labels that gaps explain, each pair counted in both orders.

    Args:
        gaps: score of the first image less that of the second, of n pairs.
        labels: probability that the first is the better one.

    Returns:
        R^2 of the regression of label - 1/2 on the gap, through the origin: in both orders each
        pair has opposite gaps and opposite labels. None where either is always zero.
    """
    centred = [label - 0.5 for label in labels]
    spread = math.fsum(gap * gap for gap in gaps) * math.fsum(y * y for y in centred)
    if spread == 0:
        return None
    shared = math.fsum(gap * y for gap, y in zip(gaps, centred, strict=True))
    if shared <= 0:
        return 0.0  # a score that contradicts the labels explains nothing that could be trained on
    return shared * shared / spread
