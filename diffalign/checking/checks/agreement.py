"""How far the annotators of the same pair agree."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from diffalign.checking.checks.base import AbstractCheck, Figure, Finding, Outcome, Share
from diffalign.checking.checks.repeated import ANNOTATOR, annotator_of, label_of, question_of
from diffalign.checking.rows import Examined
from diffalign.intervals import (
    Bootstrap,
    Interval,
    agreement_tally,
    krippendorff_alpha,
    majority_excess,
)
from diffalign.ranges import AtLeast, Between

_RESAMPLES = 1000
_BEYOND_CHANCE = 2.0
"""Deviations by which majorities of people who look at images exceed those of coins, at least."""


@dataclass(frozen=True, kw_only=True)
class Agreement(AbstractCheck):
    """Krippendorff's alpha of the labels of pairs that several people labelled: in several rows,
    where a column says whose label each is, or as votes in columns. 1 is agreement, 0 is chance.

    A pair's two labels are its two images in the order of their digests, so that the order in which
    they were shown plays no part. Ties are left out.
    """

    title: ClassVar[str] = "Annotator agreement"

    least: Annotated[float, Between(-1, 1)] = 0.1
    """A finding where the whole interval of alpha is below this, and majorities are no larger than
    tossed coins would make them."""
    at_least: Annotated[int, AtLeast(2)] = 20
    """Pairs with several labels below which agreement is not judged."""

    @classmethod
    def reads(cls, column: str) -> bool:
        return ANNOTATOR.fullmatch(column) is not None

    def look(self, data: Examined) -> Outcome:
        labels = _labels(data)
        tally = agreement_tally(labels)
        units = len(tally["disagreements"])
        if not units:
            return Outcome(passed_over="no pair has labels that columns give to several people")
        bootstrap = Bootstrap(confidence=data.confidence, resamples=_RESAMPLES)
        interval = bootstrap.intervals(tally, {"alpha": krippendorff_alpha})["alpha"]
        sums = {name: np.asarray(counts.sum()) for name, counts in tally.items()}
        alpha = float(krippendorff_alpha(sums))
        unanimous = int((tally["disagreements"] == 0).sum())
        given = int(sum(counts.sum() for name, counts in tally.items() if name != "disagreements"))
        figures: dict[str, Figure] = {
            "pairs with several labels": units,
            "labels of them": given,
            "unanimous pairs": Share.of_trials(unanimous, units, data.confidence),
        }
        if not np.isnan(alpha):
            figures["Krippendorff's alpha"] = _in_words(alpha, interval)
        low = interval is not None and interval.high < self.least and units >= self.at_least
        tossed = low and majority_excess(labels) < _BEYOND_CHANCE
        return Outcome(figures=figures, findings=[self._finding(alpha, units)] if tossed else [])

    def _finding(self, alpha: float, units: int) -> Finding:
        return Finding(
            name="no_agreement",
            severity="harmful",
            count=units,
            what=f"On {units:,} pairs with several labels the annotators agree no better than "
            f"chance (Krippendorff's alpha {alpha:.2f})",
            harm="most of the labels say nothing about the images",
            advice="ask more people a pair and keep clear majorities, or ask another question",
        )


def _in_words(alpha: float, interval: Interval | None) -> str:
    ends = "" if interval is None else f" ({interval.low:.2f} to {interval.high:.2f})"
    return f"{alpha:.2f}{ends}"


def _labels(data: Examined) -> NDArray[np.float64]:
    """How many gave the first and the second label, by pair, [pairs, 2]."""
    found: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for number, row in data.pairs:
        question = question_of(data, number)
        if question is None or not isinstance(label := label_of(row), bytes):
            continue
        own = sorted(question[-1]).index(label) if len(question[-1]) == 2 else None
        if own is None:
            continue
        if data.scores_are_votes and row.scores is not None and _are_counts(row.scores):
            found[question][own] += max(row.scores)
            found[question][1 - own] += min(row.scores)
        elif annotator_of(row) is not None:
            found[question][own] += 1
    return np.array(list(found.values()), dtype=float).reshape(-1, 2)


def _are_counts(scores: tuple[float, float]) -> bool:
    return all(score >= 0 and score == int(score) for score in scores)
