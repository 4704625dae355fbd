"""A data set as rows of named values, read at random or in order."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
    """Rows in order only."""

    @abc.abstractmethod
    def rows(self, start: Cursor | None = None) -> Iterator[tuple[Cursor, Row]]:
        """Every row from a place on, once, each with the cursor at which it is read again.

        Args:
            start: a cursor that an earlier call gave; None for the first row.
        """
