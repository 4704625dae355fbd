"""Whether the longer response wins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from diffalign.checking.checks.base import AbstractCheck, Finding, Outcome, Share
from diffalign.checking.rows import Examined, Kind
from diffalign.ranges import Between


@dataclass(frozen=True, kw_only=True)
class Lengths(AbstractCheck):
    """Words of chosen and rejected responses, and the share of pairs whose longer one won, with an
    exact binomial interval."""

    title: ClassVar[str] = "Lengths of responses"
    of: ClassVar[frozenset[Kind]] = frozenset({"responses"})

    tolerance: Annotated[float, Between(0, 0.5)] = 0.1
    """A share that is nearer to one half than this is no finding, however many rows there are."""

    def look(self, data: Examined) -> Outcome:
        words = np.array(
            [
                (row.responses["chosen"].words, row.responses["rejected"].words)
                for _, row in data.pairs
                if {"chosen", "rejected"} <= set(row.responses)
            ]
        ).reshape(-1, 2)
        if not len(words):
            return Outcome(passed_over="no row has both a chosen and a rejected response")
        chosen, rejected = words.T
        unequal = int((chosen != rejected).sum())
        share = Share.of_trials(int((chosen > rejected).sum()), unequal, data.confidence)
        means = float(chosen.mean()), float(rejected.mean())
        biased = unequal and share.excludes(0.5, by=self.tolerance)
        return Outcome(
            figures={
                "mean words of chosen": round(means[0], 1),
                "mean words of rejected": round(means[1], 1),
                "longer response won": share,
            },
            counts={
                "Longer response": {
                    "chosen": share.count,
                    "neither": len(words) - unequal,
                    "rejected": unequal - share.count,
                }
            },
            findings=[self._finding(share, means)] if biased else [],
        )

    @staticmethod
    def _finding(share: Share, means: tuple[float, float]) -> Finding:
        longer = share.value > 0.5
        return Finding(
            name="length_bias",
            severity="doubtful",
            count=share.larger.count,
            share=share,
            what=f"The {'longer' if longer else 'shorter'} response won in {share.larger} pairs of "
            f"unequal length ({means[0]:.1f} words chosen, {means[1]:.1f} rejected, on average)",
            harm=f"training may make responses {'longer' if longer else 'shorter'} in place of "
            f"better",
            advice="pair responses of like length, or take an objective that divides by length "
            "(simpo) or token weights of kind shared_length",
        )
