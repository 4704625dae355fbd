"""Rows of several images with a number each, read as rows of two: every pair of them is one.

Such as HPDv2 and ImageRewardDB have them: a list of images next to a list of scores or ranks, or
numbered columns (`image_0` to `image_3` with `score_0` to `score_3`). What becomes of a pair, ties
included, is then decided as for any two images. `chosen` next to a list of `rejected` (or the other
way round) is every chosen image against every rejected one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np

from diffalign.data.pairs.columns import (
    PROMPT_NAMES,
    PairColumns,
    find_columns,
    general_columns,
    smaller_wins,
)
from diffalign.data.rows import AbstractRows, AbstractRowStream, Cursor, Row, Schema
from diffalign.errors import DataError, did_you_mean

_LISTS_OF_IMAGES = (
    "images",
    "image",
    "image_paths",
    "image_path",
    "file_paths",
    "file_path",
    "image_files",
    "jpgs",
    "pngs",
    "pictures",
)
_LISTS_OF_SCORES = (
    "ranks",
    "rank",
    "scores",
    "score",
    "labels",
    "label",
    "human_preference",
    "preferences",
    "preference",
    "votes",
    "ratings",
    "rating",
    "rewards",
    "reward",
    "overall_rating",
)
"""In this order: ImageRewardDB has ranks, and ratings that they come from."""

_FIELDS_OF_IMAGES = ("image", "image_path", "file_path", "path", "file", "jpg", "bytes")

_NUMBERED_IMAGES = ("image", "img", "jpg", "png", "picture", "path", "image_path", "file")
_SEPARATORS = ("_", "", "-")
_NUMBERED_SCORES = (
    "rank{sep}{number}",
    "score{sep}{number}",
    "label{sep}{number}",
    "votes{sep}{number}",
    "rating{sep}{number}",
    "reward{sep}{number}",
    "preference{sep}{number}",
    "{image}{sep}{number}_rank",
    "{image}{sep}{number}_score",
    "rank_{image}{sep}{number}",
    "score_{image}{sep}{number}",
    "votes_{image}{sep}{number}",
    "weighted_results_{image}{sep}{number}_preference",
)
"""Of the image with the same number."""


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

    def light(self) -> list[str]:
        """The columns that decide which pairs a row has."""
        lists = [_column(name) for name in self.scores or self.images]
        return [self.prompt, *lists, *filter(None, [self.pairs_per_prompt])]

    def all(self) -> list[str]:
        """Every column that is read."""
        return list(dict.fromkeys([*self.light(), *map(_column, self.images)]))

    def describe(self) -> str:
        """The whole mapping as a sentence for the user."""
        ties = ", ties are kept" if self.keep_ties else ""
        images = ", ".join(self.images)
        if not self.scores:
            rule = f"every image of {self.images[0]} is preferred to every one of {self.images[1]}"
        else:
            which = "smaller" if self.lower_is_better else "larger"
            rule = (
                "every two of a row are a pair, and preferred is the one with the "
                f"{which} of {', '.join(self.scores)}"
            )
        return f"prompt from {self.prompt}, several images a row from {images}: {rule}{ties}"

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
        )

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
        return list(combinations(range(len(scores or ())), 2)) or [(0, 0)]

    def expand(self, row: Row) -> list[Row]:
        """A row of two for each of `places`, in that order."""
        return [self._pair(row, place) for place in self.places(row)]

    def _pair(self, row: Row, place: tuple[int, int]) -> Row:
        name = f"{row.name}[{place[0]},{place[1]}]"
        values: dict[str, Any] = {self.prompt: row.values.get(self.prompt)}
        if self.pairs_per_prompt is not None:
            values[self.pairs_per_prompt] = row.values.get(self.pairs_per_prompt)
        problem = row.problem or self._problem(row)
        if problem is not None:
            return Row(name, values, row.folder, problem)
        if self.scores:
            scores = _items(row, self.scores) or []
            numbers = [scores[i] for i in place] if len(scores) > 1 else [None, None]
            values |= zip(self._names("number"), numbers, strict=True)
        if set(map(_column, self.images)) <= set(row.values):
            values |= zip(self._names("image"), self._images(row, place), strict=True)
        return Row(name, values, row.folder)

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
            value = row.values[_column(self.scores[0])]
            return f"{self.scores[0]} is {str(value)[:40]!r}, expected a list of numbers"
        below = [s for s in scores if isinstance(s, (int, float)) and s < 0]
        if below and smaller_wins(self.scores, None):
            return (
                f"{', '.join(self.scores)} holds {below[0]}, and ranks begin with 0 or 1: give an "
                f"image without a rank null"
            )
        if len(scores) < 2 or not set(map(_column, self.images)) <= set(row.values):
            return None
        images = _items(row, self.images)
        if images is None:
            value = row.values[_column(self.images[0])]
            return f"{self.images[0]} is a {type(value).__name__}, no list"
        if len(images) != len(scores):
            return (
                f"{', '.join(self.images)} holds {len(images)} images, and "
                f"{', '.join(self.scores)} {len(scores)} numbers: each image needs one"
            )
        return None


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


def _is_object(item: Any) -> bool:
    return isinstance(item, Mapping)


def _column(name: str) -> str:
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


class GroupStream(AbstractRowStream):
    """Rows of two, of a stream of rows of several; a cursor is one of theirs and a number in it."""

    def __init__(self, stream: AbstractRowStream, columns: GroupColumns) -> None:
        self._stream = stream
        self._columns = columns

    def rows(self, start: Cursor | None = None) -> Iterator[tuple[Cursor, Row]]:
        skip = 0 if start is None else start["within"]
        for cursor, row in self._stream.rows(None if start is None else start["group"]):
            for within, pair in enumerate(self._columns.expand(row)):
                if within >= skip:
                    yield {"group": dict(cursor), "within": within}, pair
            skip = 0


def recognise(
    configured: Mapping[str, str],
    schema: Schema,
    *,
    lower_is_better: bool | None,
    pickapic: bool = False,
) -> PairColumns | GroupColumns | None:
    """The mapping under `data.columns`, or else the first one known that a data set fits.

    Args:
        configured: `data.columns`.
        schema: of the data set.
        lower_is_better: whether the smaller number wins; None goes by the names of the columns.
        pickapic: whether Pick-a-Pic's columns are looked for, too.

    Raises:
        DataError: `data.columns` is incomplete or names a column that does not exist, or there is
            an image that nobody has judged.
    """
    if set(configured) == {"prompt", "images", "scores"}:
        return _configured_groups(configured, schema, lower_is_better)
    groups = None if configured else found_groups(schema, lower_is_better)
    if groups is not None:
        return groups
    find = find_columns if pickapic else general_columns
    names = [name for name in schema.names if configured or name not in schema.lists]
    columns = find(configured, names, lower_is_better=lower_is_better)
    if columns is not None and not configured:
        refuse_left_out(columns, schema.names)
    return columns


def _configured_groups(
    configured: Mapping[str, str], schema: Schema, lower_is_better: bool | None
) -> GroupColumns:
    parts = {key: tuple(map(str.strip, name.split(","))) for key, name in configured.items()}
    for key, names in parts.items():
        for name in names:
            if _column(name) not in schema.names:
                raise DataError(
                    f"data.columns.{key} names {name}, and the data set has "
                    f"{', '.join(schema.names)}.{did_you_mean(name, schema.names)}"
                )
    counts = {key: len(parts[key]) for key in ("images", "scores")}
    if min(counts.values()) > 1 and counts["images"] != counts["scores"]:
        raise DataError(
            f"data.columns names {counts['images']} columns of images and {counts['scores']} of "
            "scores: give one score for each image"
        )
    return GroupColumns(
        prompt=configured["prompt"],
        images=parts["images"],
        scores=parts["scores"],
        lower_is_better=smaller_wins(parts["scores"], lower_is_better),
    )


def found_groups(schema: Schema, lower_is_better: bool | None) -> GroupColumns | None:
    """The mapping of several images a row that a data set fits; None where it fits none.

    Args:
        schema: of the data set.
        lower_is_better: whether the smaller number wins; None goes by the names of the columns.
    """
    prompt = next((name for name in PROMPT_NAMES if name in schema.names), None)
    if prompt is None:
        return None
    if {"chosen", "rejected"} <= set(schema.names) and {"chosen", "rejected"} & schema.lists:
        return GroupColumns(prompt=prompt, images=("chosen", "rejected"))
    objects = _of_objects(schema, lower_is_better, prompt)
    if objects is not None:
        return objects
    scores: _Names | None = next(((n,) for n in _LISTS_OF_SCORES if n in schema.lists), None)
    images: _Names | None = next(((n,) for n in _LISTS_OF_IMAGES if n in schema.lists), None)
    numbered = _numbered(schema, scores) if images is None or scores is None else None
    if numbered is not None:
        images, scores = numbered
    if images is None or scores is None:
        return None
    lower = smaller_wins(scores, lower_is_better)
    return GroupColumns(prompt=prompt, images=images, scores=scores, lower_is_better=lower)


_Names = tuple[str, ...]


def _of_objects(schema: Schema, lower_is_better: bool | None, prompt: str) -> GroupColumns | None:
    """One list of objects, each with an image and its number."""
    for name, fields in schema.objects.items():
        image = next((f for f in _FIELDS_OF_IMAGES if f in fields), None)
        score = next((f for f in _LISTS_OF_SCORES if f in fields), None)
        if image is not None and score is not None:
            lower = smaller_wins([score], lower_is_better)
            return GroupColumns(
                prompt=prompt,
                images=(f"{name}.{image}",),
                scores=(f"{name}.{score}",),
                lower_is_better=lower,
            )
    return None


def _numbered(schema: Schema, listed_scores: _Names | None) -> tuple[_Names, _Names] | None:
    """More than two numbered columns of images, and those of their numbers or the one list."""
    for stem, separator in product(_NUMBERED_IMAGES, _SEPARATORS):
        images = _members(f"{stem}{separator}", schema.names)
        if len(images) < 3:
            continue
        if listed_scores is not None:
            return tuple(images.values()), listed_scores
        for template in _NUMBERED_SCORES:
            scores = tuple(
                template.format(image=stem, sep=separator, number=number) for number in images
            )
            if set(scores) <= set(schema.names):
                return tuple(images.values()), scores
    return None


def _members(start: str, names: Collection[str]) -> dict[str, str]:
    """Number -> column of that start, in the order of the numbers."""
    found = {
        name.removeprefix(start): name
        for name in names
        if name.startswith(start) and name.removeprefix(start).isdecimal()
    }
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def refuse_left_out(columns: PairColumns, names: Collection[str]) -> None:
    """Raise DataError where a pair of numbered images has a third one next to it.

    Args:
        columns: a mapping that was recognised, not one that a config names.
        names: of all columns.
    """
    if len(columns.images) == 1:
        _refuse_one_image_of_a_ranking(columns, names)
    if columns.images == ("chosen",):
        others = [name for name in names if name.startswith("rejected")]
        if others:
            raise DataError(
                f"{columns.describe()}; and {', '.join(others)} would be left out. Put them into a "
                "list rejected, or name the two images to be read under data.columns"
            )
    if len(columns.images) < 2:
        return
    stems = {name.rstrip("0123456789") for name in columns.images}
    others = [
        name
        for stem in stems
        for name in _members(stem, names).values()
        if name not in columns.images
    ]
    if len(stems) == 1 and others:
        raise DataError(
            f"{columns.describe()}; and {', '.join(others)} would be left out. Give every image a "
            "number of its own, as a column next to it or in a list, or name the two images to be "
            "read under data.columns"
        )


_VERDICTS = frozenset({"label", "kto_tag", "preferred", "is_preferred", "is_chosen", "desirable"})
"""Columns that may say of one image that it is not a preferred one."""


def _refuse_one_image_of_a_ranking(columns: PairColumns, names: Collection[str]) -> None:
    """Raise DataError where rows of one image each make up a ranking, as ImageRewardDB has them, or
    are labelled as preferred or not."""
    ranked = [name for name in names if smaller_wins([name], None)]
    grouped = [name for name in ("prompt_id", "group_id") if name in names]
    scored = [name for name in _LISTS_OF_SCORES if name in names]
    judged = [name for name in names if columns.images == ("image",) and name in _VERDICTS]
    if ranked or judged or (grouped and scored):
        left_out = ", ".join(dict.fromkeys([*grouped, *ranked, *judged, *scored]))
        raise DataError(
            f"{columns.describe()}; and {left_out} would be left out. Put the images of a prompt "
            "into one row, as lists images and rank (or scores); or, to take every image as a "
            f"preferred one, name {columns.prompt} and {columns.images[0]} as prompt and chosen "
            "under data.columns"
        )
