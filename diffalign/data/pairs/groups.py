"""Rows of several images with a number each, read as rows of two: every pair of them is one.

Such as HPDv2 and ImageRewardDB have them: a list of images next to a list of scores or ranks, or
numbered columns (`image_0` to `image_3` with `score_0` to `score_3`). What becomes of a pair, ties
included, is then decided as for any two images. `chosen` next to a list of `rejected` (or the other
way round) is every chosen image against every rejected one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice, product
from typing import Any

import numpy as np

from diffalign.data.pairs.columns import PairColumns, smaller_wins
from diffalign.data.rows import AbstractRows, AbstractRowStream, Cursor, Row, WrappedStream
from diffalign.data.strength.base import LABELS
from diffalign.data.strength.settings import StrengthConfig, calibrated, win_rates_of


@dataclass(frozen=True, kw_only=True)
class GroupColumns:
    """A mapping from the columns of rows with several images each."""

    prompt: str
    images: tuple[str, ...]
    """One column that holds a list, or one column an image; `column.field` where the items of a
    list are objects. Without scores, the column of the chosen and that of the rejected, at least
    one of which holds a list."""
    scores: tuple[str, ...] = ()
    """Numbers, in the same way; none where the chosen and the rejected have columns."""
    lower_is_better: bool = False
    """Whether the smaller score wins."""
    keep_ties: bool = False
    """See `PairColumns`."""
    pairs_per_prompt: str | None = None
    """See `PairColumns`."""
    strength: StrengthConfig = field(default_factory=StrengthConfig)
    """See `PairColumns`."""
    numbers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> further numbers that `strength` reads, each as `scores`."""
    along: tuple[str, ...] = ()
    """See `PairColumns`; every pair of a row has the values of the row."""
    fronts: bool = False
    """Whether only images that nothing beats are paired, each with those that beat nothing, by the
    numbers of `strength.target`; else every two."""

    def light(self) -> list[str]:
        """The columns that decide which pairs a row has, and how sure they are."""
        lists = [column_of(name) for name in self.scores or self.images]
        numbers = [column_of(name) for names in self.numbers.values() for name in names]
        return [self.prompt, *lists, *filter(None, [self.pairs_per_prompt]), *numbers]

    def all(self) -> list[str]:
        """Every column that is read."""
        images = map(column_of, self.images)
        return list(dict.fromkeys([*self.light(), *images, *self.along]))

    def describe(self) -> str:
        """The whole mapping as a sentence for the user."""
        ties = ", ties are kept" if self.keep_ties else ""
        images = ", ".join(self.images)
        if not self.scores:
            rule = f"every image of {self.images[0]} is preferred to every one of {self.images[1]}"
        else:
            which = "smaller" if self.lower_is_better else "larger"
            rule = (
                f"{self._rule_of_pairs()}, and preferred is the one with the "
                f"{which} of {', '.join(self.scores)}"
            )
        strength = f"; {said}" if (said := self.strength.describe()) else ""
        return (
            f"prompt from {self.prompt}, several images a row from {images}: {rule}{ties}{strength}"
        )

    def _rule_of_pairs(self) -> str:
        if not self.fronts:
            return "every two of a row are a pair"
        named = ", ".join(self.strength.target)
        return f"each best image of a row is paired with each worst one by {named}"

    def pairs(self) -> PairColumns:
        """The mapping of the rows of two."""
        first, second = self._names("image")
        return PairColumns(
            prompt=self.prompt,
            images=(first, second),
            scores=self._names("number") if self.scores else None,
            lower_is_better=self.lower_is_better,
            keep_ties=self.keep_ties,
            pairs_per_prompt=self.pairs_per_prompt,
            strength=self.strength,
            numbers={name: self._names(name) for name in self._listed_numbers()},
            along=self.along,
        )

    def _listed_numbers(self) -> dict[str, tuple[str, ...]]:
        """Name -> its columns, of all numbers that a pair has besides its labels; those that are
        calibrated have the columns of what they are made of."""
        found = dict(self.numbers)
        if self.strength.calibrated:
            known = {**self.numbers, LABELS: self.scores}
            found |= {win_rates_of(name): known[name] for name in self.strength.target}
        return found

    @staticmethod
    def _names(what: str) -> tuple[str, str]:
        return f"{what} of the first", f"{what} of the second"

    def places(self, row: Row) -> list[tuple[int, int]]:
        """Which two images make up each pair; one pair at least, which says why there is none.

        The same with the light columns alone as with all of them.
        """
        if row.problem is not None or (not self.scores and self._problem(row) is not None):
            return [(0, 0)]
        if not self.scores:
            chosen, rejected = (_listed(row.values[name]) for name in self.images)
            return list(product(range(len(chosen)), range(len(rejected)))) or [(0, 0)]
        scores = _items(row, self.scores)
        places = list(combinations(range(len(scores or ())), 2))
        if self.fronts:
            places = self._between_fronts(row)
        return places or [(0, 0)]

    def _between_fronts(self, row: Row) -> list[tuple[int, int]]:
        known = {**self.numbers, LABELS: self.scores}
        lists = []
        for name, factor in self.strength.target.items():
            sign = -factor if self.lower_is_better and name == LABELS else factor
            given = _items(row, known[name]) or []
            lists.append([sign * x if _is_finite(x) else None for x in given])
        if len({len(numbers) for numbers in lists}) != 1:
            return []
        points = list(zip(*lists, strict=True))
        best, worst = pareto_fronts(points)
        return sorted({(min(i, j), max(i, j)) for i in best for j in worst if i != j})

    def expand(self, row: Row) -> list[Row]:
        """A row of two for each of `places`, in that order."""
        return [self._pair(row, place) for place in self.places(row)]

    def _pair(self, row: Row, place: tuple[int, int]) -> Row:
        name = f"{row.name}[{place[0]},{place[1]}]"
        values: dict[str, Any] = {self.prompt: row.values.get(self.prompt)}
        if self.pairs_per_prompt is not None:
            values[self.pairs_per_prompt] = row.values.get(self.pairs_per_prompt)
        values |= {name: row.values.get(name) for name in self.along}
        problem = row.problem or self._problem(row)
        if problem is not None:
            return Row(name, values, row.folder, problem)
        if self.scores:
            scores = _items(row, self.scores) or []
            numbers = [scores[i] for i in place] if len(scores) > 1 else [None, None]
            values |= zip(self._names("number"), numbers, strict=True)
        for known in self._listed_numbers():
            values |= zip(self._names(known), self._further(row, known, place), strict=True)
        if set(map(column_of, self.images)) <= set(row.values):
            values |= zip(self._names("image"), self._images(row, place), strict=True)
        return Row(name, values, row.folder)

    def _further(self, row: Row, name: str, place: tuple[int, int]) -> list[Any]:
        """The numbers of a name of two images, which may be missing or none."""
        given = _items(row, self._listed_numbers()[name]) or []
        if name not in self.numbers:
            given = _win_rates(given, lower_is_better=self._is_lower(name))
        return [given[i] if i < len(given) else None for i in place]

    def _is_lower(self, name: str) -> bool:
        return self.lower_is_better and name == win_rates_of(LABELS)

    def _images(self, row: Row, place: tuple[int, int]) -> list[Any]:
        if self.scores:
            images = _items(row, self.images) or []
            return [images[i] if i < len(images) else None for i in place]
        sides = [_listed(row.values[name]) for name in self.images]
        return [side[i] if i < len(side) else None for side, i in zip(sides, place, strict=True)]

    def _problem(self, row: Row) -> str | None:
        """Why no pair can be made of a row, if so."""
        if not self.scores:
            held = ((n, next(iter(_listed(row.values[n])), None)) for n in self.images)
            raw = [n for n, first in held if isinstance(first, (int, float, list, np.ndarray))]
            return f"{raw[0]} holds numbers, expected images as bytes or paths" if raw else None
        scores = _items(row, self.scores)
        if scores is None:
            value = row.values[column_of(self.scores[0])]
            return f"{self.scores[0]} is {str(value)[:40]!r}, expected a list of numbers"
        below = [s for s in scores if isinstance(s, (int, float)) and s < 0]
        if below and smaller_wins(self.scores, None):
            return (
                f"{', '.join(self.scores)} holds {below[0]}, and ranks begin with 0 or 1: give an "
                f"image without a rank null"
            )
        if len(scores) < 2 or not set(map(column_of, self.images)) <= set(row.values):
            return None
        images = _items(row, self.images)
        if images is None:
            value = row.values[column_of(self.images[0])]
            return f"{self.images[0]} is a {type(value).__name__}, no list"
        if len(images) != len(scores):
            return (
                f"{', '.join(self.images)} holds {len(images)} images, and "
                f"{', '.join(self.scores)} {len(scores)} numbers: each image needs one"
            )
        return None


def pareto_fronts(
    points: Sequence[Sequence[float | None]],
) -> tuple[list[int], list[int]]:
    """Those of N points that none beats, and those that beat none.

    One beats another if it is at least as high in every number and higher in one.

    Args:
        points: the numbers of each, the higher the better; one that lacks a number is left out.

    Returns:
        Their places, ascending; a point may be on both fronts.

    Source: the pair selection of CaPO, arXiv:2502.02588.
    """

    def beats(one: int, other: int) -> bool:
        pairs = list(zip(known[one], known[other], strict=True))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    known = {
        place: [x for x in point if x is not None]
        for place, point in enumerate(points)
        if None not in point
    }
    best = [i for i in known if not any(beats(j, i) for j in known)]
    worst = [i for i in known if not any(beats(i, j) for j in known)]
    return best, worst


def _items(row: Row, names: tuple[str, ...]) -> list[Any] | None:
    """What a column of lists holds, or several columns together; None where it is no list."""
    if len(names) > 1:
        return [row.values[name] for name in names]
    column, _, field = names[0].partition(".")
    value = row.values[column]
    if value is None:
        return []
    if not isinstance(value, (list, tuple, np.ndarray)):
        return None
    if not field:
        return list(value)
    return [item.get(field) for item in value] if all(map(_is_object, value)) else None


def _win_rates(given: Sequence[Any], *, lower_is_better: bool) -> list[Any]:
    """Those of a row's images whose numbers can be read; None for the others."""
    numbers = [x if _is_finite(x) else None for x in given]
    sign = -1 if lower_is_better else 1
    known = [sign * x for x in numbers if x is not None]
    rates = iter(calibrated(known) if len(known) > 1 else [None] * len(known))
    return [None if x is None else next(rates) for x in numbers]


def _is_finite(item: Any) -> bool:
    return isinstance(item, (int, float)) and math.isfinite(item)


def _is_object(item: Any) -> bool:
    return isinstance(item, Mapping)


def column_of(name: str) -> str:
    return name.partition(".")[0]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]


class GroupRows(AbstractRows):
    """Rows of two, of rows of several that are read at random."""

    noun = "comparisons"

    def __init__(self, rows: AbstractRows, columns: GroupColumns) -> None:
        self._rows = rows
        self._columns = columns
        counts = [len(columns.places(row)) for row in rows.scan(columns.light())]
        self._ends = np.cumsum(np.array(counts, dtype=np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Row:
        row, within = self._place(index)
        return self._columns.expand(self._rows[row])[within]

    def start_of(self, index: int) -> Row:
        row, within = self._place(index)
        return self._columns.expand(self._rows.start_of(row))[within]

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        for row in self._rows.scan(self._columns.light()):
            yield from self._columns.expand(row)

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the row of several, and of the pair in it."""
        row = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[row - 1]) if row else 0
        return row, index - before


_COUNTED = 100
"""Rows of a stream whose pairs are counted, to say about how many there are."""


class GroupStream(WrappedStream):
    """Rows of two, of a stream of rows of several; a cursor is one of theirs and a number in it."""

    def __init__(self, stream: AbstractRowStream, columns: GroupColumns) -> None:
        super().__init__(stream)
        self._columns = columns

    @property
    def about_rows(self) -> int | None:
        rows = self._stream.about_rows
        if not rows:
            return rows
        light = self._stream.only(self._columns.light()).all_rows()
        pairs = [len(self._columns.places(row)) for row in islice(light, _COUNTED)]
        return round(rows * sum(pairs) / max(1, len(pairs)))

    def only(self, columns: Sequence[str]) -> GroupStream:
        return GroupStream(self._stream.only(self._columns.light()), self._columns)

    def rows(self, part: int, start: Cursor | None = None) -> Iterator[tuple[Cursor, Row]]:
        skip = 0 if start is None else start["within"]
        for cursor, row in self._stream.rows(part, None if start is None else start["group"]):
            for within, pair in enumerate(self._columns.expand(row)):
                if within >= skip:
                    yield {"group": dict(cursor), "within": within}, pair
            skip = 0
