"""What was made so far: one line a question, added as it comes, never changed.

A killed run goes on after its last whole line. Questions are made in batches of the whole plan, so
that a run that went on makes them in the same company as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.errors import ConfigError
from diffalign.files import append_json_lines, read_json_lines
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
        for row in read_json_lines(self._path) if self._path.is_file() else []:
            if not isinstance(row, dict) or row.get("made_by") != self._made_by:
                raise ConfigError(
                    f"{self._path} was made under other settings, from other questions or by other "
                    f"tools (synthesise.yaml beside it has them), and cannot be gone on with; give "
                    f"output another folder"
                )
            self._lines[row["id"]] = _parsed(row)

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


def _parsed(row: Mapping[str, Any]) -> Made | Unmade:
    if "made" in row:
        return Made(sample_id=row["id"], values=row["made"])
    return Unmade(sample_id=row["id"], **row["skipped"])


def _digest(settings: Mapping[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
