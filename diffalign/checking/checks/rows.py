"""How many rows there are, and which of them cannot be used."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from diffalign.checking.checks.base import (
    AbstractCheck,
    Figure,
    Finding,
    Outcome,
    of_all,
)
from diffalign.checking.rows import Examined
from diffalign.data.skipping import LeftOut, SkipReason
from diffalign.keys import hide

_HARM = "training skips and lists them, and stops where there are more than max_bad_fraction"
_ADVICE: dict[SkipReason, str] = {
    SkipReason.EMPTY_CAPTION: "write captions, or take the rows out",
    SkipReason.EMPTY_PROMPT: "write the question, or take the rows out",
    SkipReason.EMPTY_RESPONSE: "take them out: the model that wrote them was cut off",
    SkipReason.IDENTICAL: "take them out: nothing is preferred to the same thing",
    SkipReason.MISSING_IMAGE: "give the images, or correct paths or image_folder",
    SkipReason.REMOTE: "download the images and give their paths",
    SkipReason.MARKERS: "write one <image> for each image of the row",
}
_REPAIR = "repair them, or take them out"


@dataclass(frozen=True, kw_only=True)
class Rows(AbstractCheck):
    """Rows with a preference, ties, rows without a label, and rows that cannot be read."""

    title: ClassVar[str] = "Rows"

    def look(self, data: Examined) -> Outcome:
        left_out = Counter(row.left_out for row in data.rows if row.left_out is not None)
        skipped = [row for row in data.rows if row.skipped is not None]
        prompts = Counter(key for _, row in data.pairs for key in [row.prompt] if key)
        figures: dict[str, Figure] = {
            data.noun: len(data.rows),
            "with a preference": len(data.pairs),
            "ties": left_out[LeftOut.TIE],
            "without a label": left_out[LeftOut.UNLABELLED] + left_out[LeftOut.OTHER_LABEL],
            "unusable": len(skipped),
            "different prompts": len(prompts),
        }
        if prompts:
            figures["most rows of one prompt"] = max(prompts.values())
        sides = Counter(tuple(row.responses) for _, row in data.pairs if len(row.responses) == 1)
        for (side,), count in sorted(sides.items()):
            figures[f"rows with a {side} response alone"] = count
        found = [self._unusable(data, reason) for reason in SkipReason]
        return Outcome(
            figures=figures, findings=[finding for finding in found if finding is not None]
        )

    def _unusable(self, data: Examined, reason: SkipReason) -> Finding | None:
        rows = [row for row in data.rows if row.skipped and row.skipped.reason is reason]
        if not rows:
            return None
        first = rows[0].skipped
        assert first is not None
        cannot = of_all(len(rows), len(data.rows), data.noun, "have")
        return Finding(
            name=f"unusable_{reason.name.lower()}",
            severity="harmful",
            count=len(rows),
            what=f"{cannot} the problem {reason.value} ({hide(first.detail):.120})",
            harm=_HARM,
            advice=_ADVICE.get(reason, _REPAIR),
            rows=[row.name for row in rows],
        )
