"""JSON lines: one object a pair, with a prompt and the paths of two images.

Relative paths start from the folder of the file. Names of the fields are those that other readers
know: `chosen` and `rejected`, or `image1` and `image2` with a number for each, and Pick-a-Pic's; or
`chosen` alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from diffalign.data.columns import PairColumns, find_columns
from diffalign.data.reading import AbstractReader, Form, Location
from diffalign.data.rows import AbstractRows, Row
from diffalign.data.source import DataConfig
from diffalign.errors import DataError


@dataclass(frozen=True, kw_only=True)
class JsonLines(AbstractReader):
    """One or more .jsonl files."""

    form: ClassVar[Form] = "lines"
    needs: ClassVar[str] = (
        "prompt (or caption) with paths under chosen and rejected, or under image1, image2 and one "
        "number for each (label1 and label2, score1 and score2), or under chosen alone"
    )

    def column_names(self, location: Location, config: DataConfig) -> tuple[str, ...]:
        with location.files[0].open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    return tuple(_parsed(line, f"{location.files[0]}:{number}"))
        raise DataError(f"{location.files[0]} is empty")

    def match(self, names: Sequence[str], config: DataConfig) -> PairColumns | None:
        return find_columns(config.columns, names, lower_is_better=config.lower_is_better)

    def open(self, location: Location, columns: PairColumns, config: DataConfig) -> AbstractRows:
        return _LineRows(location, columns)


class _LineRows(AbstractRows):
    """Lines by number: only where each begins is kept in memory."""

    def __init__(self, location: Location, columns: PairColumns) -> None:
        assert location.root is not None
        self._root = location.root
        self._files = location.files
        self._columns = columns
        lines = [
            (file, number, offset)
            for file, path in enumerate(self._files)
            for number, offset in _line_starts(path)
        ]
        self._lines = np.array(lines, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        file, number, offset = self._lines[index].tolist()
        with self._files[file].open("rb") as lines:
            lines.seek(offset)
            return self._row(file, number, lines.readline())

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        for file, path in enumerate(self._files):
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield self._row(file, number, line)

    def _row(self, file: int, number: int, line: bytes) -> Row:
        path = self._files[file]
        name = f"{path.relative_to(self._root).as_posix()}:{number}"
        values = _parsed(line, name)
        row = {column: values.get(column) for column in self._columns.all()}
        for column in self._columns.images:
            if row[column]:
                row[column] = path.parent / str(row[column])
        return Row(name, row)


def _line_starts(path: Path) -> Iterator[tuple[int, int]]:
    """Number and first byte of every line that is not blank."""
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, offset
            offset += len(line)


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{where} is no JSON object but {line[:40]!r}")
    return values
