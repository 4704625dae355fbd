"""The data set at `responses.path`, and the mapping that understands it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from diffalign import components
from diffalign.data.location import DataLocation, Form, Location, fingerprint, locate
from diffalign.data.responses.conversation import Comparison, malformed
from diffalign.data.responses.formats.base import AbstractMapping, is_tie, numbered
from diffalign.data.responses.images import looks_like_images
from diffalign.data.responses.records import ResponsePair
from diffalign.data.rows import AbstractRows, LineRows, ListRows, Row
from diffalign.data.skipping import LeftOut, Skipped, UnusableRowError
from diffalign.data.strength.base import LABELS, Strength, number_pair
from diffalign.data.strength.settings import StrengthConfig
from diffalign.data.tables import TableRows, load_table
from diffalign.errors import ConfigError, DataError, did_you_mean

_SUFFIXES: Mapping[str, Form] = {
    ".parquet": "table",
    ".arrow": "table",
    ".jsonl": "lines",
    ".json": "list",
}


SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
    ("votes_chosen", "votes_rejected"),
)
"""Columns in use for the numbers by which the chosen response was chosen."""
_NO_IMAGES = "no column of images"
_OF_IMAGES = re.compile(
    r"(.+_)?(image|img|picture|photo)s?(_?(path|file|file_?name|name|url|id|list)s?)?",
    re.IGNORECASE,
)
"""Names of columns that say which image a row is about."""
_LOOKED_AT = 100
"""Rows of a table that are read for a value of each column."""


class RowsConfig(DataLocation, Protocol):
    """The part of a section of the config that is about its rows."""

    @property
    def kind(self) -> str:
        """Their form, or `auto`."""

    @property
    def columns(self) -> Mapping[str, str]:
        """The form's name for a column -> the data set's."""

    @property
    def image_folder(self) -> str | None:
        """Folder that relative names of images start from."""


@dataclass(frozen=True, kw_only=True)
class OpenedResponses:
    """A data set of responses whose form is known."""

    rows: AbstractRows
    mapping: AbstractMapping
    columns: tuple[str, ...]
    """Those of all rows, as the data set names them."""
    names: Mapping[str, str]
    """The data set's name for a column -> the mapping's, where they differ."""
    folder: Path | None
    """Where relative names of images start, unless the row has its own folder; None on the hub."""
    image_folder: Path | None
    """Where they start whatever the row says, if the config has it."""
    summary: str
    """The data and its mapping, as a sentence."""
    fingerprint: str
    """Another one for other data; the same wherever the data lies."""
    strength: StrengthConfig = field(default_factory=StrengthConfig)
    """What becomes of the numbers of a row besides the order of its responses."""
    keep_ties: bool = False
    """Whether a tie is half a preference for either response, instead of being left out."""
    labels: tuple[str, str] | None = None
    """Columns of the numbers of chosen and rejected, where the mapping has none itself."""

    def comparisons(self, row: Row) -> list[Comparison | LeftOut | Skipped]:
        """The comparisons of a row by its text and numbers; its images may be absent."""
        if row.problem is not None:
            return [malformed(row.problem).skipped(row.name)]
        found = self.mapping.checked(self._values(row), row.name, keep_ties=self.keep_ties)
        if self.strength.is_default:
            return found
        return [self._if_strong(each, row, place, len(found)) for place, each in enumerate(found)]

    def _if_strong(
        self, found: Comparison | LeftOut | Skipped, row: Row, place: int, count: int
    ) -> Comparison | LeftOut | Skipped:
        """A comparison, or why its numbers cannot be used."""
        try:
            if isinstance(found, Comparison):
                if any(row.values.get(name) is None for name in self._columns(found)):
                    return LeftOut.UNLABELLED
                self._strength(found, row)
            return found
        except UnusableRowError as error:
            return error.skipped(numbered(row.name, place, count))

    def _columns(self, comparison: Comparison) -> list[str]:
        """Those that the strength of a comparison is read from."""
        strength = self.strength
        found = [name for of in strength.columns for name in strength.columns_of(of)]
        reads_labels = LABELS in strength.reads and comparison.scores is None
        return [*found, *(self.labels or ())] if reads_labels else found

    def _strength(self, comparison: Comparison, row: Row) -> Strength:
        numbers = {
            name: number_pair(row.values, self.strength.columns_of(name))
            for name in self.strength.columns
        }
        if LABELS in self.strength.reads:
            numbers[LABELS] = comparison.scores or number_pair(row.values, self.labels or ())
        return self.strength.of(numbers, keeps_ties=self.keep_ties, tie=is_tie(comparison))

    def without_images(self) -> Iterator[list[Comparison | LeftOut | Skipped]]:
        """`comparisons` of all rows in order; of tables, images are not read."""
        return (found for _, found in self.with_rows())

    def with_rows(self) -> Iterator[tuple[Row, list[Comparison | LeftOut | Skipped]]]:
        """`without_images`, next to the row of each."""
        heavy = self.mapping.heavy_columns()
        light = [name for name in self.columns if self.names.get(name, name) not in heavy]
        return ((row, self.comparisons(row)) for row in self.rows.scan(light))

    def gap(self, comparison: Comparison, row: Row) -> float | None:
        """Of the numbers by which the data says which response is better; None without such."""
        if comparison.scores is None and self.labels is None:
            return None
        try:
            chosen, rejected = comparison.scores or number_pair(row.values, self.labels or ())
        except UnusableRowError:
            return None
        return chosen - rejected

    def pair(self, number: int, place: int) -> ResponsePair | Skipped:
        """One comparison of a row with its images, or why it cannot be used.

        Args:
            number: of the row.
            place: of the comparison in it.
        """
        row = self.rows[number]
        found = self.comparisons(row)
        comparison = found[place]
        if isinstance(comparison, Skipped):
            return comparison
        assert isinstance(comparison, Comparison), "the index holds comparisons only"
        return self._pair(row, comparison, place, len(found))

    def pairs_of(self, row: Row) -> list[ResponsePair | LeftOut | Skipped]:
        """All comparisons of a row with their images, or why each cannot be used."""
        found = self.comparisons(row)
        return [
            self._pair(row, each, place, len(found)) if isinstance(each, Comparison) else each
            for place, each in enumerate(found)
        ]

    def _pair(
        self, row: Row, comparison: Comparison, place: int, count: int
    ) -> ResponsePair | Skipped:
        return self.mapping.pair(
            comparison,
            self._values(row),
            sample_id=numbered(row.name, place, count),
            folder=self.image_folder or row.folder or self.folder,
            strength=self._strength(comparison, row),
        )

    def is_of_row(self, sample_id: str, number: int) -> bool:
        """Whether a pair of this id is a comparison of that row."""
        name = self.rows[number].name
        return sample_id == name or sample_id.rpartition("#")[0] == name

    def _values(self, row: Row) -> dict[str, Any]:
        """By the mapping's names; null where a row lacks what the mapping needs."""
        return {**dict.fromkeys(self.mapping.needs), **renamed(row.values, self.names)}


def open_responses(
    config: RowsConfig, *, strength: StrengthConfig | None = None, keep_ties: bool = False
) -> OpenedResponses:
    """Find the data, recognise its form, and open it.

    Args:
        config: where it lies, and what its columns mean.
        strength: what becomes of the numbers of a row; None for nothing.
        keep_ties: whether ties are kept.

    Raises:
        DataError: nothing is there, or no mapping fits its columns.
        ConfigError: there is no such `kind`, several would do, or its images would not be read.
    """
    location = locate(config, suffixes=_SUFFIXES, sides=())
    rows = _open(location, config)
    if not len(rows):
        raise DataError(f"{location.describe()}: there is no row in it")
    first = _overview(rows)
    if not first and (problem := rows[0].problem) is not None:
        raise DataError(problem)
    names = _names(config, first)
    kind, mapping = _choose(renamed(first, names), config, location)
    column = mapping.image_column(renamed(first, names))
    images = f"images from {column}" if column else _images_of_messages(mapping, first, names)
    if column is None:
        alone = images == _NO_IMAGES
        _check_text_alone(renamed(first, names), kind, mapping, config, by_name=alone)
    strength = strength or StrengthConfig()
    labels = next((pair for pair in SCORES if set(pair) <= set(first)), None)
    _check_strength(strength, mapping, first, labels, config)
    said = f"; {strength.describe()}" if strength.describe() else ""
    return OpenedResponses(
        rows=rows,
        mapping=mapping,
        columns=tuple(first),
        names=names,
        folder=location.root,
        image_folder=Path(config.image_folder).expanduser() if config.image_folder else None,
        summary=f"{location.describe()}, read as {kind}: {mapping.summary}, {images}"
        f"{', ties are kept' * keep_ties}{said}",
        fingerprint=fingerprint(location, config),
        strength=strength,
        keep_ties=keep_ties,
        labels=labels,
    )


def _check_strength(
    strength: StrengthConfig,
    mapping: AbstractMapping,
    first: Mapping[str, Any],
    labels: tuple[str, str] | None,
    config: RowsConfig,
) -> None:
    """Raise DataError where `strength` reads what there is not."""
    if strength.is_default:
        return
    if not mapping.paired:
        raise DataError(
            f"{config.section}.{next(iter(strength.asked.values()))}, and each row of "
            f"{config.path} has one response, with nothing to compare it with: leave "
            f"{config.section}.strength out"
        )
    pairs = ", or ".join(" and ".join(pair) for pair in SCORES)
    problem = (
        None
        if mapping.scored or labels
        else f"this data set says which response was chosen without numbers of the two ({pairs})"
    )
    strength.check(config.section, names=list(first), labels=problem)
    for name in strength.columns:
        columns = strength.columns_of(name)
        count, wanted = len(columns), 2 - strength.is_share(name)
        is_list = count == 1 and isinstance(first[columns[0]], (list, tuple))
        if count != wanted and not is_list:
            sides = "the chosen and the rejected response" if wanted == 2 else "the chosen response"
            raise DataError(
                f"{config.section}.strength.columns.{name} names {count} columns, and must name "
                f"{wanted}, of {sides}"
            )


def _overview(rows: AbstractRows) -> dict[str, Any]:
    """Every column with a value of it: the first that is neither null nor empty.

    Rows of JSON may each have columns of their own, so all are looked at; a table says its columns.
    """
    whole = isinstance(rows, TableRows)
    found: dict[str, Any] = {}
    for row in (rows[i] for i in range(min(len(rows), _LOOKED_AT))) if whole else rows.scan(()):
        for name, value in row.values.items():
            if found.get(name) is None or (_says_nothing(found[name]) and not _says_nothing(value)):
                found[name] = value
        if whole and not any(map(_says_nothing, found.values())):
            break
    return found


def _says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Values under other names, where `names` has one; what was called so before is left out."""
    taken = set(names.values()) - set(names)
    return {names.get(n, n): value for n, value in values.items() if n not in taken}


def _open(location: Location, config: RowsConfig) -> AbstractRows:
    if location.form == "table":
        dataset = load_table(location, config)
        return TableRows(dataset, dataset.column_names)
    assert location.root is not None
    reader = LineRows if location.form == "lines" else ListRows
    return reader(location.files, location.root)


def _names(config: RowsConfig, first: Mapping[str, Any]) -> dict[str, str]:
    """`columns` of the config the other way round."""
    for known, own in config.columns.items():
        if own not in first:
            raise DataError(
                f"{config.section}.columns.{known} is {own}, and the data set has "
                f"{', '.join(first)}." + did_you_mean(own, first)
            )
    return {own: known for known, own in config.columns.items()}


def _images_of_messages(
    mapping: AbstractMapping, first: Mapping[str, Any], names: Mapping[str, str]
) -> str:
    """Description of the images by the first row, where no column has any."""
    try:
        values = {**dict.fromkeys(mapping.needs), **renamed(first, names)}
        found = [some for some in mapping.comparisons(values) if isinstance(some, Comparison)]
    except UnusableRowError:
        found = []
    turns = [turn for some in found for turn in (*some.turns, *chain(*some.contexts.values()))]
    held = any(turn.images for turn in turns)
    return "images from the messages" if held else _NO_IMAGES


def _check_text_alone(
    first: Mapping[str, Any],
    kind: str,
    mapping: AbstractMapping,
    config: RowsConfig,
    *,
    by_name: bool,
) -> None:
    """Raise ConfigError if a data set that is read without images has a column of them, to judge by
    its values, or `by_name` where nothing else shows any."""
    unread = [name for name in first if name not in mapping.heavy_columns()]
    found = next((name for name in unread if looks_like_images(first[name])), None)
    if found is None and by_name:
        told = [n for n in unread if _OF_IMAGES.fullmatch(n) and not isinstance(first[n], bool)]
        found = next((name for name in told if not _says_nothing(first[name])), None)
    if found is not None:
        known = " or ".join(mapping.image_columns)
        raise ConfigError(
            f"{config.section}.path {config.path}: {kind} takes images from {known}, and there is "
            f"no such column, but {found} looks like one of images ({first[found]!r:.60}). Give "
            f"{config.section}.columns='{{{mapping.image_columns[-1]}: {found}}}', or take the "
            f"column out if the images are not to be seen"
        )


def _choose(
    first: Mapping[str, Any], config: RowsConfig, location: Location
) -> tuple[str, AbstractMapping]:
    """The mapping that needs most of the columns, among those that fit."""
    kinds = components.kinds(AbstractMapping) if config.kind == "auto" else [config.kind]
    try:
        mappings = {kind: components.find(AbstractMapping, kind)() for kind in kinds}  # type: ignore[type-abstract]
    except ConfigError as error:
        raise ConfigError(f"{config.section}.kind: {error}") from error
    fitting = [kind for kind, mapping in mappings.items() if mapping.fits(first)]
    if not fitting:
        raise DataError(_unknown(first, mappings, location, config))
    most = max(len(mappings[kind].needs) for kind in fitting)
    best = [kind for kind in fitting if len(mappings[kind].needs) == most]
    if len(best) > 1:
        raise ConfigError(
            f"{config.section}.path {config.path} can be read as {' or '.join(best)}: set "
            f"{config.section}.kind"
        )
    return best[0], mappings[best[0]]


def _unknown(
    first: Mapping[str, Any],
    mappings: Mapping[str, AbstractMapping],
    location: Location,
    config: RowsConfig,
) -> str:
    known: Sequence[str] = [f"{kind}: {m.describe_needs()}" for kind, m in mappings.items()]
    return (
        f"{location.describe()}: the columns {', '.join(first) or '(none)'} fit no form of "
        "preferences between responses. Known forms and the columns they need:\n  "
        + "\n  ".join(known)
        + f"\nOther names can be given: {config.section}.columns='{{FORM'S NAME: YOURS}}'"
    )
