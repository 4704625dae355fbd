"""Whether the image that is named first wins more often than chance has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from diffalign.checking.checks.base import AbstractCheck, Finding, Outcome, Share
from diffalign.checking.rows import Examined, Kind
from diffalign.ranges import Between


@dataclass(frozen=True, kw_only=True)
class Position(AbstractCheck):
    """Wins of the first image among decided pairs, with an exact binomial interval.

    Data without a first and second (`chosen` and `rejected`, rankings) is passed over.
    """

    title: ClassVar[str] = "Position"
    of: ClassVar[frozenset[Kind]] = frozenset({"images"})

    tolerance: Annotated[float, Between(0, 0.5)] = 0.02
    """A share that is nearer to one half than this is no finding, however many rows there are."""

    def look(self, data: Examined) -> Outcome:
        won = [row.first_won for _, row in data.pairs if row.first_won is not None]
        if not won:
            return Outcome(passed_over="no column says which of two images was named first")
        share = Share.of_trials(sum(won), len(won), data.confidence)
        findings = []
        if share.count in (0, share.of) and share.excludes(0.5):
            findings.append(self._always(share))
        elif share.excludes(0.5, by=self.tolerance):
            findings.append(self._biased(share))
        return Outcome(
            figures={"first image won": share},
            counts={"Winner by position": {"first": share.count, "second": share.of - share.count}},
            findings=findings,
        )

    def _biased(self, share: Share) -> Finding:
        first = share.value > 0.5
        by_place = abs(2 * share.value - 1)
        return Finding(
            name="position_bias",
            severity="harmful",
            count=share.larger.count,
            share=share,
            what=f"The {'first' if first else 'second'} image won in "
            f"{share.larger} decided pairs, which chance does not explain",
            harm=f"if their order was random, {100 * by_place:.0f} % of the labels say "
            f"where an image was and not how good it is",
            advice="show images in random order, take out annotators who click one side, or weigh "
            "votes",
        )

    def _always(self, share: Share) -> Finding:
        first = share.count > 0
        return Finding(
            name="position_constant",
            severity="doubtful",
            count=share.of,
            what=f"The {'first' if first else 'second'} image won in all {share.of:,} decided "
            f"pairs",
            harm="harmless if the winner is stored there, fatal if the labels were lost",
            advice="make sure which it is; data that stores the winner first can name its columns "
            "chosen and rejected",
        )
