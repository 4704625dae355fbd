"""Images that are missing or cannot be read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from diffalign.checking.checks.base import AbstractCheck, Finding, Outcome, counted
from diffalign.checking.rows import Examined, ImageFacts, SeenAt
from diffalign.data.skipping import SkipReason

_HARM = "training skips and lists their rows, and stops where there are more than max_bad_fraction"


@dataclass(frozen=True, kw_only=True)
class Images(AbstractCheck):
    """Missing images, and broken ones: of no known format, empty, cut off, damaged, too large.

    Every header is read, and so is the end of every file. Damage in the middle of a file shows in
    those alone that are decoded.
    """

    title: ClassVar[str] = "Images"

    def look(self, data: Examined) -> Outcome:
        bad = [(place, image) for place, image in data.shown() if image.reason is not None]
        missing = [each for each in bad if each[1].reason is SkipReason.MISSING_IMAGE]
        broken = [each for each in bad if each[1].reason is not SkipReason.MISSING_IMAGE]
        shown = sum(len(row.images) for _, row in data.pairs)
        if not shown:
            return Outcome(passed_over="there are no images")
        findings = []
        if missing:
            findings.append(
                self._finding(
                    data,
                    missing,
                    name="missing_images",
                    what=f"{len(missing):,} of {counted(shown, 'images')} "
                    f"{'is' if len(missing) == 1 else 'are'} missing",
                    advice="give them, or correct the paths",
                )
            )
        if broken:
            reasons = Counter(image.reason.value for _, image in broken if image.reason)
            kinds = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
            findings.append(
                self._finding(
                    data,
                    broken,
                    name="broken_images",
                    what=f"{len(broken):,} of {counted(shown, 'images')} cannot be read ({kinds})",
                    advice="fetch them again, or take their rows out",
                )
            )
        return Outcome(
            figures={
                "images": shown,
                "different files": len(data.seen),
                "missing": len(missing),
                "broken": len(broken),
                "decoded": data.decoded,
            },
            findings=findings,
        )

    @staticmethod
    def _finding(
        data: Examined,
        images: list[tuple[SeenAt, ImageFacts]],
        *,
        name: str,
        what: str,
        advice: str,
    ) -> Finding:
        return Finding(
            name=name,
            severity="harmful",
            count=len(images),
            what=what,
            harm=_HARM,
            advice=advice,
            rows=[f"{data.rows[place.row].name} {place.side}" for place, _ in images],
            examples=[[SeenAt(p.row, side) for side in data.rows[p.row].images] for p, _ in images],
        )
