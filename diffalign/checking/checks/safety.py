"""Columns that say whether an image, a prompt or a response is safe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from diffalign.checking.checks.base import AbstractCheck, Figure, Finding, Outcome, of_all
from diffalign.checking.rows import Examined
from diffalign.ranges import Between

_UNSAFE = re.compile(r"(^|[^a-z])(nsfw|unsafe|toxic(ity)?|harmful|explicit)([^a-z]|$)", re.I)
_SAFE = re.compile(r"(is_?)?(safe|sfw)(_?\d)?", re.I)
_YES = ("true", "yes", "nsfw", "unsafe", "toxic", "harmful", "explicit")
_NO = ("false", "no", "sfw", "safe", "none", "nan", "")


@dataclass(frozen=True, kw_only=True)
class Safety(AbstractCheck):
    """Rows that columns such as `nsfw`, `image_0_nsfw`, `toxicity` or `is_safe` flag. Nothing is
    judged here, and images are not looked at."""

    title: ClassVar[str] = "Safety columns"

    threshold: Annotated[float, Between(0, 1)] = 0.5
    """Above it a probability counts as a flag."""

    @classmethod
    def reads(cls, column: str) -> bool:
        return bool(_UNSAFE.search(column) or _SAFE.fullmatch(column))

    def look(self, data: Examined) -> Outcome:
        columns = sorted({name for _, row in data.pairs for name in row.values if self.reads(name)})
        if not columns:
            return Outcome(passed_over="no column says what is safe")
        figures: dict[str, Figure] = {}
        flagged: dict[int, str] = {}
        for name in columns:
            found = [n for n, row in data.pairs if self._flags(name, row.values.get(name))]
            figures[f"flagged by {name}"] = len(found)
            flagged |= {number: data.rows[number].name for number in found}
        findings = []
        if flagged:
            cited = ", ".join(columns)
            findings.append(
                Finding(
                    name="flagged_unsafe",
                    severity="doubtful",
                    count=len(flagged),
                    what=f"{of_all(len(flagged), len(data.pairs), 'pairs', 'are')} flagged by "
                    f"{cited}",
                    harm="the model learns from them whatever they show",
                    advice="take them out unless they are meant to be there",
                    rows=[flagged[number] for number in sorted(flagged)],
                )
            )
        return Outcome(figures=figures, findings=findings)

    def _flags(self, column: str, value: Any) -> bool:
        probability = _as_number(value)
        if probability is None:
            return False
        unsafe = _UNSAFE.search(column) is not None
        return probability > self.threshold if unsafe else probability <= self.threshold


def _as_number(value: Any) -> float | None:
    """From 0 to 1; None where a value says nothing."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    text = text.strip().lower()
    if value is None or text in ("none", "nan", ""):
        return None
    if text in _YES or text in _NO:
        return float(text in _YES)
    try:
        return float(text)
    except ValueError:
        return None
