"""Rows of the same two images, one an annotator, read as one pair whose labels add up.

A data set may hold a row for each person who was asked about a pair. Rows with the same caption and
the same two images, in either order, are one pair here: its labels are the sums over its rows, as
votes are. It takes the place, the images and the id of the first of them; a row without a label
stays by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from diffalign.data.pairs.columns import PairColumns
from diffalign.data.pairs.groups import GroupColumns
from diffalign.data.rows import AbstractRows, AbstractRowStream, Row
from diffalign.data.skipping import LeftOut, UnusableRowError
from diffalign.errors import DataError, did_you_mean


@dataclass
class _Pair:
    """What is known of a pair while rows are counted."""

    first: int
    """Number of its first row."""
    images: tuple[str, ...] = ()
    """Of that row, in its order."""
    votes: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """For either of them."""
    rows: int = 0


class AnnotatedRows(AbstractRows):
    """One row for each pair, of rows that are one annotator's each."""

    noun = "compared pairs"

    def __init__(self, rows: AbstractRows, columns: PairColumns, images: tuple[str, ...]) -> None:
        """Read the labels of all rows, and no image.

        Args:
            rows: one an annotator.
            columns: their mapping, with scores.
            images: the columns that say which the first and which the second image is.
        """
        assert columns.scores is not None, "it was checked"
        self._rows, self._scores = rows, columns.scores
        found: dict[Hashable, _Pair] = {}
        light = dict.fromkeys([*columns.light(), *images])
        for number, row in enumerate(rows.scan(list(light))):
            names = tuple(str(row.values.get(name)) for name in images)
            votes = _votes(row, columns)
            if votes is None:
                found[number] = _Pair(number)
                continue
            pair = found.setdefault((columns.caption(row), *sorted(names)), _Pair(number, names))
            votes = votes if pair.images == names else votes[::-1]
            pair.votes = [before + vote for before, vote in zip(pair.votes, votes, strict=True)]
            pair.rows += 1
        self._pairs = list(found.values())
        self._places = np.array([pair.first for pair in self._pairs], dtype=np.int64)
        self.set_aside = rows.set_aside

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Row:
        return self._with_votes(self._rows[int(self._places[index])], index)

    def start_of(self, index: int) -> Row:
        return self._with_votes(self._rows.start_of(int(self._places[index])), index)

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        index = 0
        for number, row in enumerate(self._rows.scan(columns)):
            if index < len(self._places) and number == self._places[index]:
                yield self._with_votes(row, index)
                index += 1

    def _with_votes(self, row: Row, index: int) -> Row:
        pair = self._pairs[index]
        if not pair.rows:
            return row
        votes = dict(zip(self._scores, pair.votes, strict=True))
        return replace(row, values={**row.values, **votes})


def _votes(row: Row, columns: PairColumns) -> list[float] | None:
    """The labels of a row; None where it has none, or none that can be used."""
    assert columns.scores is not None, "it was checked"
    try:
        if columns.chosen(row) is LeftOut.UNLABELLED or columns.caption_or_none(row) is None:
            return None
    except UnusableRowError:
        return None
    return [float(row.values[name]) for name in columns.scores]


def image_columns(
    columns: PairColumns | GroupColumns, annotators: str, names: Sequence[str]
) -> tuple[str, ...]:
    """The columns that `data.annotators` names.

    Args:
        columns: the mapping of the data set.
        annotators: the setting.
        names: of all columns.

    Raises:
        DataError: they are not there, or rows have no numbers that could add up.
    """
    images = tuple(map(str.strip, annotators.split(",")))
    if not isinstance(columns, PairColumns) or columns.scores is None:
        raise DataError(
            "data.annotators adds up labels, and this data set has no number for each of two "
            "images in a row: leave it out"
        )
    if len(images) != 2:
        raise DataError(
            f"data.annotators is {annotators!r}, and must name two columns with a comma between: "
            f"what the first and what the second image is, such as image_0_uid, image_1_uid"
        )
    for name in images:
        if name not in names:
            raise DataError(
                f"data.annotators names {name}, and the data set has {', '.join(names)}."
                f"{did_you_mean(name, list(names))}"
            )
    return images


def by_pair(rows: AbstractRows | AbstractRowStream, columns: PairColumns) -> AnnotatedRows:
    """The rows of a data set with several annotators, one a pair.

    Args:
        rows: read at random.
        columns: their mapping, whose `others` say which image is which.

    Raises:
        DataError: they are streamed.
    """
    if isinstance(rows, AbstractRowStream):
        raise DataError(
            "data.annotators adds up the rows of a pair, which lie anywhere, and this data set is "
            "streamed: set data.streaming to false"
        )
    return AnnotatedRows(rows, columns, columns.others)
