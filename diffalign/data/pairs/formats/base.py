"""Readers of image pairs: the contract, and the choice of the one that understands a data set."""

from __future__ import annotations

import abc
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffalign import components
from diffalign.data.location import Form, Location, fingerprint, locate
from diffalign.data.pairs.annotators import by_pair, image_columns
from diffalign.data.pairs.columns import ImagePair, PairColumns
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.groups import GroupColumns, GroupRows, GroupStream
from diffalign.data.pairs.known_columns import KNOWN_NAMES, PICKAPIC_PAIRS_PER_PROMPT
from diffalign.data.pairs.scored import with_scores
from diffalign.data.rows import AbstractRows, AbstractRowStream, Row, Schema
from diffalign.data.skipping import LeftOut, Skipped, UnusableRowError
from diffalign.data.strength.base import LABELS
from diffalign.errors import ConfigError, DataError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class OpenedPairs:
    """A data set that a reader has opened."""

    rows: AbstractRows | AbstractRowStream
    columns: PairColumns
    base: Path | None
    """Folder that relative image paths start from."""
    summary: str
    """What is read by what, and the mapping, as a sentence."""
    fingerprint: str
    """Another one for other data; the same wherever the data lies."""
    scores: str = ""
    """Another one for other files of scores; empty where there are none."""

    def pairs(self) -> Iterator[ImagePair | Skipped]:
        """Every row that should hold a preference, once and in order."""
        rows = self.rows
        if isinstance(rows, AbstractRowStream):
            in_order = rows.all_rows()
        else:
            in_order = (rows[number] for number in range(len(rows)))
        found = (self.read(row) for row in in_order)
        return (pair for pair in found if isinstance(pair, (ImagePair, Skipped)))

    def read(self, row: Row) -> ImagePair | LeftOut | Skipped:
        """The row as a preference, or why it holds none or cannot be used."""
        try:
            return self.columns.pair(row, self.base)
        except UnusableRowError as error:
            return error.skipped(self.columns.sample_id(row))


@dataclass(frozen=True, kw_only=True)
class AbstractReader(abc.ABC):
    """One layout of preference pairs. Its module is its `kind`."""

    form: ClassVar[Form]
    """What it reads."""
    needs: ClassVar[str]
    """What it must find, for messages."""

    @abc.abstractmethod
    def schema(self, location: Location, config: PairConfig) -> Schema:
        """The columns of a data set, from its description or its first rows."""

    @abc.abstractmethod
    def match(self, schema: Schema, config: PairConfig) -> PairColumns | GroupColumns | None:
        """The mapping for a data set with these columns; None where it is another layout."""

    @abc.abstractmethod
    def open(
        self, location: Location, columns: PairColumns | GroupColumns, config: PairConfig
    ) -> AbstractRows | AbstractRowStream:
        """The rows, at random or streamed."""


def open_data(
    config: PairConfig, *, along: Callable[[str], bool] = lambda name: False
) -> OpenedPairs:
    """Find the data, choose its reader, and open it.

    Args:
        config: of the data.
        along: whether a column of this name is read along with those that make up a pair.

    Raises:
        DataError: nothing is there, or no reader understands it.
        ConfigError: there is no such `data.kind`, or several would do.
    """
    location = locate(config)
    kind, reader, schema, found = _choose(location, config)
    found = _as_configured(found, config, schema)
    if config.users is not None and config.users not in schema.names:
        raise DataError(
            f"data.users names {config.users}, and the data set has {', '.join(schema.names)}."
            f"{did_you_mean(config.users, schema.names)}"
        )
    wanted = (name for name in schema.names if along(name) or name == config.users)
    further = tuple(name for name in wanted if name not in found.all())
    found = dataclasses.replace(found, along=further)
    rows: AbstractRows | AbstractRowStream = reader.open(location, found, config)
    if isinstance(found, PairColumns):
        columns = found
        if found.others:
            rows = by_pair(rows, found)
            columns = dataclasses.replace(found, allowed_scores=())  # of sums
    else:
        columns = found.pairs()
        if isinstance(rows, AbstractRowStream):
            rows = GroupStream(rows, found)
        else:
            rows = GroupRows(rows, found)
    columns = dataclasses.replace(columns, user=config.users)
    if config.buckets and isinstance(rows, AbstractRowStream):
        raise DataError(
            f"data.buckets needs every image's size in advance, and {location.describe()} is "
            "streamed: set data.buckets to false"
        )
    scored = with_scores(
        rows, columns, location.root, config, grouped=isinstance(found, GroupColumns)
    )
    if scored is not None:
        rows, columns = scored.rows, scored.columns
    streamed = ", streamed" if isinstance(rows, AbstractRowStream) else ""
    return OpenedPairs(
        rows=rows,
        columns=columns,
        base=location.root,
        summary=f"{location.describe()}, read by {kind}{streamed}: {found.describe()}"
        f"{_unread(schema, found)}{_set_aside(rows)}{_added_up(config)}"
        f"{f'; {scored.summary}' if scored else ''}",
        fingerprint=fingerprint(location, config),
        scores=scored.fingerprint if scored else "",
    )


def _unread(schema: Schema, columns: PairColumns | GroupColumns) -> str:
    """The columns that nobody reads, by name."""
    left = [name for name in schema.names if name not in columns.all()]
    return f"; not read: {', '.join(left)}" if left else ""


def _added_up(config: PairConfig) -> str:
    if config.annotators is None:
        return ""
    return f"; rows of the same prompt and images ({config.annotators}) are added up"


def _set_aside(rows: AbstractRows | AbstractRowStream) -> str:
    aside = rows.set_aside if isinstance(rows, AbstractRows) else ""
    return f"; set aside: {aside}" if aside else ""


def _as_configured(
    columns: PairColumns | GroupColumns, config: PairConfig, schema: Schema
) -> PairColumns | GroupColumns:
    """The mapping with the config's wishes for ties, weights and strength."""
    if config.weighting == "per_prompt" and columns.pairs_per_prompt is None:
        raise DataError(
            f"data.weighting per_prompt needs the column {PICKAPIC_PAIRS_PER_PROMPT}, which "
            f"{config.path} has not: set it to uniform"
        )
    counted = columns.pairs_per_prompt if config.weighting == "per_prompt" else None
    _check_strength(columns, config, schema)
    strength = config.strength
    if isinstance(columns, PairColumns) and LABELS in strength.reads:
        columns = dataclasses.replace(columns, allowed_scores=())  # counts, shares or scores
    if config.group_pairs == "fronts":
        columns = _with_fronts(columns, config)
    if config.annotators is not None:
        images = image_columns(columns, config.annotators, schema.names)
        assert isinstance(columns, PairColumns), "others are refused"
        columns = dataclasses.replace(columns, others=images)
    return dataclasses.replace(
        columns,
        keep_ties=config.ties == "keep",
        pairs_per_prompt=counted,
        strength=strength,
        numbers={name: strength.columns_of(name) for name in strength.columns},
    )


def _with_fronts(columns: PairColumns | GroupColumns, config: PairConfig) -> GroupColumns:
    if isinstance(columns, PairColumns) or not columns.scores:
        raise DataError(
            f"data.group_pairs is fronts, and {config.path} has no rows of several images with "
            f"scores, of which it would choose the pairs: leave it at all"
        )
    if not config.strength.target:
        raise DataError(
            "data.group_pairs is fronts, which are those of the numbers of data.strength.target, "
            "and there are none: name them, such as {labels: 1.0}"
        )
    return dataclasses.replace(columns, fronts=True)


def _check_strength(
    columns: PairColumns | GroupColumns, config: PairConfig, schema: Schema
) -> None:
    """Raise DataError where `data.strength` reads what there is not."""
    strength = config.strength
    if strength.is_default:
        return
    if isinstance(columns, PairColumns) and len(columns.images) == 1:
        raise DataError(
            f"data.{next(iter(strength.asked.values()))}, and every image of {config.path} is a "
            f"preferred one, with nothing to compare it with: leave data.strength out"
        )
    problem = None
    if not columns.scores:
        problem = "this data set says which image was preferred without numbers of the two"
    elif strength.preference.counts and columns.lower_is_better:
        problem = "the smaller of them wins here (data.labels), as no votes do"
    strength.check("data", names=schema.names, labels=problem)
    for name in strength.columns:
        count, share = len(strength.columns_of(name)), strength.is_share(name)
        if isinstance(columns, GroupColumns):
            if share:
                raise DataError(
                    f"data.strength.preference is of a probability of the first image, and "
                    f"{config.path} has several images a row: give scores, and kind gap"
                )
        elif count != 2 - (share or set(strength.columns_of(name)) <= schema.lists):
            wanted = "one, of the first image" if share else "two, of the first and second image"
            raise DataError(
                f"data.strength.columns.{name} names {count} columns, and must name {wanted}"
            )


def _choose(
    location: Location, config: PairConfig
) -> tuple[str, AbstractReader, Schema, PairColumns | GroupColumns]:
    kinds = components.kinds(AbstractReader) if config.kind == "auto" else [config.kind]
    readers = {kind: components.find(AbstractReader, kind)() for kind in kinds}  # type: ignore[type-abstract]
    suited = {kind: reader for kind, reader in readers.items() if reader.form == location.form}
    if not suited:
        needs = "; ".join(f"{kind} needs {reader.needs}" for kind, reader in readers.items())
        raise DataError(f"data.kind {config.kind} cannot read {location.describe()}: {needs}")
    schema = next(iter(suited.values())).schema(location, config)
    matches = {kind: reader.match(schema, config) for kind, reader in suited.items()}
    found = [(kind, suited[kind], schema, columns) for kind, columns in matches.items() if columns]
    if len(found) > 1:
        kinds_found = " or ".join(kind for kind, *_ in found)
        raise ConfigError(f"data.path {config.path} can be read by {kinds_found}: set data.kind")
    if not found:
        raise DataError(_unreadable(location, schema, suited))
    return found[0]


def _unreadable(location: Location, schema: Schema, readers: Mapping[str, AbstractReader]) -> str:
    names = schema.names
    needs = "; ".join(f"{kind} needs {reader.needs}" for kind, reader in readers.items())
    spelling = "".join(
        f" {name} looks like {nearest[0]}."
        for name in names
        if name not in KNOWN_NAMES
        and (nearest := difflib.get_close_matches(name, KNOWN_NAMES, n=1, cutoff=0.75))
    )
    held = ", ".join(name for name in schema.names if name in schema.lists)
    lists = (
        f" Lists are held by {held}: one of images is read next to one of ranks, scores or labels "
        f"with a number for each, or under data.columns as images and scores."
        if held
        else ""
    )
    return (
        f"{location.describe()}: no preference in the columns {', '.join(names) or '(none)'}. "
        f"{needs}.{spelling}{lists} Other names can be given under data.columns"
    )
