"""A data set as rows of named values, read at random or in order; rows of JSON files."""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import DataError
from diffalign.files import read_bytes
from diffalign.parsing import parse_json


@dataclass(frozen=True)
class Row:
    """One row."""

    name: str
    """Its place in the data set, independent of where the data set lies."""
    values: Mapping[str, Any]
    """Column -> value; images are bytes, paths or {bytes, path}."""
    folder: Path | None = None
    """Folder that relative paths in it start from, where rows of a data set differ in that."""
    problem: str | None = None
    """Why nothing of it can be used, where that shows before its columns are understood."""


@dataclass(frozen=True)
class Schema:
    """The columns of a data set."""

    names: tuple[str, ...]
    lists: frozenset[str] = frozenset()
    """Those that hold a list of values in each row."""
    objects: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Those of them whose values are objects, and the fields of these."""


class AbstractRows(abc.ABC):
    """Rows by number."""

    noun: str = "rows"
    """What one of them is, in the plural, for counts."""
    set_aside: str = ""
    """What lies among the data and is none of it, for the line on the data set."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Row: ...

    def start_of(self, index: int) -> Row:
        """A row whose images may be cut off after a while, where that is cheaper to read."""
        return self[index]

    @abc.abstractmethod
    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        """All rows in order, with these columns only: the others are not read."""


Cursor = Mapping[str, Any]
"""A place in a stream, of plain JSON values."""


class AbstractRowStream(abc.ABC):
    """Rows in order only, in parts that are read each by itself: row groups, files, shards."""

    @property
    @abc.abstractmethod
    def parts(self) -> Sequence[int]:
        """How large each part is, in rows, bytes or whatever tells them apart."""

    @property
    def held_bytes(self) -> int:
        """Memory that a part may take while it is being read, next to the rows asked for."""
        return 0

    @abc.abstractmethod
    def rows(self, part: int, start: Cursor | None = None) -> Iterator[tuple[Cursor, Row]]:
        """Every row of a part from a place on, once, each with a cursor to read it again.

        Args:
            part: its number.
            start: a cursor that an earlier call for this part gave; None for its first row.
        """

    @property
    def about_rows(self) -> int | None:
        """About how many rows there are, without reading much; None where nobody knows."""
        return None

    def only(self, columns: Sequence[str]) -> AbstractRowStream:
        """The same rows with these columns alone, where that saves reading the others."""
        return self

    def all_rows(self) -> Iterator[Row]:
        """Every row in the order of the data set."""
        for part in range(len(self.parts)):
            yield from (row for _, row in self.rows(part))


class WrappedStream(AbstractRowStream):
    """A stream whose rows are made of another one's, part by part."""

    def __init__(self, stream: AbstractRowStream) -> None:
        self._stream = stream

    @property
    def parts(self) -> Sequence[int]:
        return self._stream.parts

    @property
    def held_bytes(self) -> int:
        return self._stream.held_bytes

    @property
    def about_rows(self) -> int | None:
        return self._stream.about_rows


class LineRows(AbstractRows):
    """Objects of .jsonl files by number: only where each begins is kept in memory."""

    def __init__(
        self, files: Sequence[Path], root: Path, columns: Sequence[str] | None = None
    ) -> None:
        """Args:
        files: in order.
        root: folder that the names of rows start from.
        columns: what every row has, null where its line has not; None takes a line as it is. A
            line that is no object is a row with a problem.
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
        values, problem = dict[str, Any](), None
        try:
            values = _parsed(line, name)
        except DataError as error:
            problem = str(error)
        if self._columns is not None:
            values = {column: values.get(column) for column in self._columns}
        return Row(name, values, path.parent, problem)


class ListRows(AbstractRows):
    """Objects of .json files, each one list; they are kept in memory."""

    def __init__(
        self, files: Sequence[Path], root: Path, columns: Sequence[str] | None = None
    ) -> None:
        """Args:
        files: in order.
        root: folder that the names of rows start from.
        columns: what every row has, null where its object has not; None takes it as it is. An
            item that is no object is a row with a problem.
        """
        self._rows = [
            row if columns is None else _with_columns(row, columns)
            for path in files
            for row in _rows_of(path, root)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        return iter(self._rows)


_SCHEMA_LINES = 100
"""Lines that are read to know the columns: not every line need have all of them."""


def line_schema(path: Path) -> Schema:
    """The fields of the first lines that are objects.

    Raises:
        DataError: there is none.
    """
    found: list[dict[str, Any]] = []
    problem = DataError(f"{path} is empty")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    found.append(_parsed(line, f"{path}:{number}"))
            except DataError as error:
                problem = error
            if max(len(found), number) == _SCHEMA_LINES:
                break
    if not found:
        raise problem
    return object_schema(found)


def list_schema(path: Path) -> Schema:
    """The fields of the first objects of a list.

    Raises:
        DataError: it is no list of objects.
    """
    first = list(islice(_rows_of(path, path.parent), _SCHEMA_LINES))
    if not first:
        raise DataError(f"{path} is an empty list")
    objects = [row.values for row in first if row.problem is None]
    if not objects:
        raise DataError(first[0].problem)
    return object_schema(objects)


def object_schema(objects: Sequence[Mapping[str, Any]]) -> Schema:
    """The fields of any of these objects; a list is what is one in most of them."""
    names = tuple(dict.fromkeys(name for values in objects for name in values))
    lists = Counter(n for values in objects for n, v in values.items() if isinstance(v, list))
    filled = Counter(n for values in objects for n, v in values.items() if v is not None)
    usual = frozenset(name for name in lists if 2 * lists[name] > filled[name])
    fields: dict[str, frozenset[str]] = {}
    for name in usual:
        held = [v for values in objects if isinstance(v := values.get(name), list)]
        items = [item for value in held for item in value if isinstance(item, dict)]
        if items:
            fields[name] = frozenset().union(*items)
    return Schema(names, usual, fields)


def _with_columns(row: Row, columns: Sequence[str]) -> Row:
    return dataclasses.replace(row, values={name: row.values.get(name) for name in columns})


def _rows_of(path: Path, root: Path) -> Iterator[Row]:
    try:
        objects = parse_json(read_bytes(path), path)
    except DataError as error:
        raise DataError(f"{error}. A file with one object a line is named .jsonl") from error
    if not isinstance(objects, list):
        raise DataError(f"{path} holds a {type(objects).__name__}, expected a list of objects")
    for number, values in enumerate(objects):
        name = f"{path.relative_to(root).as_posix()}[{number}]"
        problem = None
        if not isinstance(values, dict):
            numbers = isinstance(values, list) and all(isinstance(v, (int, float)) for v in values)
            of_d3po = " (numbers of D3PO are read as rollouts.preferences, next to the groups)"
            found = f"{str(values)[:40]!r}{of_d3po if numbers else ''}"
            values, problem = {}, f"{name} is no JSON object but {found}"
        yield Row(name, values, path.parent, problem)


def _line_starts(path: Path) -> Iterator[tuple[int, int]]:
    """Number and first byte of every line that is not blank."""
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, offset
            offset += len(line)


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    values = parse_json(line, where)
    if not isinstance(values, dict):
        raise DataError(f"{where} is no JSON object but {line[:40]!r}")
    return values
