"""The rows made so far: one line a question, in their order, never changed.

Questions are made in batches of the whole plan, its blocks, so that a run that was stopped and went
on makes them in the same batches as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.batching import each_or_error
from diffalign.blocks import AbstractPlan, Block, Do, Failed, Row
from diffalign.data.responses.questions import Question, Unmade
from diffalign.errors import ConfigError, DiffalignError
from diffalign.files import add_json_lines, read_json_lines
from diffalign.parsing import checked
from diffalign.synthesis.base import Made, Maker

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
        self.made_by = _digest(settings)
        """Digest of the settings."""
        self._lines: dict[str, Made | Unmade] = {}
        rows = read_json_lines(self._path) if self._path.is_file() else []
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict) or row.get("made_by") != self.made_by:
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

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, as `row` makes them, all or none; those that are there already are left out."""
        lines = [checked(_Line, row, str(self._path)) for row in rows]
        new = [place for place, line in enumerate(lines) if line.id not in self._lines]
        self._lines |= {lines[place].id: _parsed(lines[place]) for place in new}
        if new:
            add_json_lines(self._path, [rows[place] for place in new])

    def row(self, line: Made | Unmade) -> dict[str, Any]:
        """The line of the file."""
        row: dict[str, Any] = {"id": line.sample_id, "made_by": self.made_by}
        if isinstance(line, Made):
            return {**row, "made": dict(line.values)}
        return {**row, "skipped": {"reason": line.reason, "detail": line.detail}}


class MadePlan(AbstractPlan):
    """What is made of questions, as blocks: those that are made at once."""

    title, unit = "synthesise", "questions"

    def __init__(
        self,
        journal: Journal,
        questions: Sequence[Question | Unmade],
        folder: Path,
        *,
        batch_size: int,
        device: str,
        open_maker: Callable[[str | None], Maker],
    ) -> None:
        """Args:
        journal: of the folder.
        questions: all of them; may be read from disk one by one.
        folder: for the rows and their images.
        batch_size: questions made at once.
        device: of the settings.
        open_maker: makes what makes something of questions, on a worker's device.
        """
        self.journal, self.questions = journal, questions
        self.folder, self.device = folder, device
        self._open_maker = open_maker
        count = len(questions)
        ranges = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
        self.blocks = [
            Block.of(place, [journal.made_by, some.start, some.stop], len(some), some)
            for place, some in enumerate(ranges)
        ]

    def is_done(self, block: Block) -> bool:
        return all(item.sample_id in self.journal for item in self._items(block))

    def _items(self, block: Block) -> Sequence[Question | Unmade]:
        return self.questions[block.work.start : block.work.stop]

    def open(self, device: str | None, upcoming: Sequence[Block]) -> Do:
        maker = self._open_maker(device)
        return lambda block: self._make(maker, self._items(block))

    def _make(self, maker: Maker, batch: Sequence[Question | Unmade]) -> list[Row | Failed]:
        asked = [item for item in batch if isinstance(item, Question)]
        made: dict[str, Row | Failed] = {
            item.sample_id: Row(self.journal.row(item))
            for item in batch
            if isinstance(item, Unmade)
        }
        for question, result in each_or_error(maker, asked) if asked else ():
            if isinstance(result, DiffalignError):
                raise result
            if isinstance(result, Exception):
                reason = f"{type(result).__name__}: {result}"
                made[question.sample_id] = Failed({"id": question.sample_id, "reason": reason})
            else:
                made[question.sample_id] = Row(self.journal.row(result))
        return [made[item.sample_id] for item in batch]

    def merge(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.journal.add(rows)


def of_failed(failed: Mapping[str, Any]) -> Unmade:
    """A question at which something broke that nobody foresaw."""
    return Unmade(sample_id=failed["id"], reason=FAILED, detail=failed["reason"])


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
