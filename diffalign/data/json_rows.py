"""Rows of JSON files: one object a line, or one list of objects a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.data.rows import AbstractRows, Row, Schema
from diffalign.errors import DataError


class LineRows(AbstractRows):
    """Objects of .jsonl files by number: only where each begins is kept in memory."""

    def __init__(
        self, files: Sequence[Path], root: Path, columns: Sequence[str] | None = None
    ) -> None:
        """Args:
        files: in order.
        root: folder that the names of rows start from.
        columns: what every row has, null where its line has not; None takes a line as it is.
        """
        self._files = files
        self._root = root
        self._columns = columns
        lines = [
            (file, number, offset)
            for file, path in enumerate(files)
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
        if self._columns is not None:
            values = {column: values.get(column) for column in self._columns}
        return Row(name, values, folder=path.parent)


class ListRows(AbstractRows):
    """Objects of .json files, each one list; they are kept in memory."""

    def __init__(self, files: Sequence[Path], root: Path) -> None:
        """Args:
        files: in order.
        root: folder that the names of rows start from.
        """
        self._rows = [row for path in files for row in _rows_of(path, root)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        return iter(self._rows)


_SCHEMA_LINES = 100
"""Lines that are read to know the columns: not every line need have all of them."""


def line_schema(path: Path) -> Schema:
    """The fields of the first lines that are not blank.

    Raises:
        DataError: there is none.
    """
    found: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                found.append(_parsed(line, f"{path}:{number}"))
            if len(found) == _SCHEMA_LINES:
                break
    if not found:
        raise DataError(f"{path} is empty")
    return object_schema(found)


def object_schema(objects: Sequence[Mapping[str, Any]]) -> Schema:
    """The fields of any of these objects; a list is what is one in most of them."""
    names = tuple(dict.fromkeys(name for values in objects for name in values))
    lists = Counter(n for values in objects for n, v in values.items() if isinstance(v, list))
    filled = Counter(n for values in objects for n, v in values.items() if v is not None)
    return Schema(names, frozenset(name for name in lists if 2 * lists[name] > filled[name]))


def _rows_of(path: Path, root: Path) -> Iterator[Row]:
    try:
        objects = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(
            f"{path} is no JSON: {error}. A file with one object a line is named .jsonl"
        ) from error
    if not isinstance(objects, list):
        raise DataError(f"{path} holds a {type(objects).__name__}, expected a list of objects")
    for number, values in enumerate(objects):
        name = f"{path.relative_to(root).as_posix()}[{number}]"
        if not isinstance(values, dict):
            raise DataError(f"{name} is no JSON object but {str(values)[:40]!r}")
        yield Row(name, values, folder=path.parent)


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
