"""The rows made so far: one line a question, added as it comes, never changed.

A killed run goes on after its last whole line. Questions are made in batches of the whole plan, so
that a run that went on makes them in the same batches as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.errors import ConfigError
from diffalign.files import append_json_lines, read_json_lines
from diffalign.parsing import checked
from diffalign.synthesis.base import Made, Unmade

NAME = "made.jsonl"
FAILED = "failed"
"""The reason of a question at which something broke that nobody foresaw."""


class Journal:
    """The lines of a folder that were made under the same settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Read what is there.

        Args:
            folder: need not exist.
            settings: plain values of all that decides about a line.

        Raises:
            ConfigError: lines were made under other settings.
        """
        self._path = folder / NAME
        self._made_by = _digest(settings)
        self._lines: dict[str, Made | Unmade] = {}
        rows = read_json_lines(self._path) if self._path.is_file() else []
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict) or row.get("made_by") != self._made_by:
                raise ConfigError(
                    f"{self._path} was made under other settings, from other questions or by other "
                    f"tools (synthesise.yaml next to it has them), and cannot be gone on with; "
                    f"give "
                    f"output another folder"
                )
            line = checked(_Line, row, f"{self._path}: line {number}")
            self._lines[line.id] = _parsed(line)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._lines

    def __getitem__(self, sample_id: str) -> Made | Unmade:
        return self._lines[sample_id]

    def add(self, lines: Sequence[Made | Unmade]) -> None:
        """Write what is not there yet, and wait until the disk has it.

        What failed is known to this run alone: the next one tries it again.
        """
        new = [line for line in lines if line.sample_id not in self._lines]
        self._lines |= {line.sample_id: line for line in new}
        lasting = [line for line in new if isinstance(line, Made) or line.reason != FAILED]
        if lasting:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_json_lines(self._path, [self._row(line) for line in lasting])

    def _row(self, line: Made | Unmade) -> dict[str, Any]:
        row: dict[str, Any] = {"id": line.sample_id, "made_by": self._made_by}
        if isinstance(line, Made):
            return {**row, "made": dict(line.values)}
        return {**row, "skipped": {"reason": line.reason, "detail": line.detail}}


@dataclass(frozen=True, kw_only=True)
class _Skipped:
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A line of the file: what was made, or why nothing was."""

    id: str
    made_by: str
    """Digest of the settings."""
    made: dict[str, Any] | None = None
    skipped: _Skipped | None = None

    def __post_init__(self) -> None:
        if (self.made is None) == (self.skipped is None):
            raise ValueError("must have either made or skipped")


def _parsed(row: _Line) -> Made | Unmade:
    if row.made is not None:
        return Made(sample_id=row.id, values=row.made)
    assert row.skipped is not None  # __post_init__ checked
    return Unmade(sample_id=row.id, reason=row.skipped.reason, detail=row.skipped.detail)


def _digest(settings: Mapping[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
