"""What lies at `data.path`, and which reader understands it."""

from __future__ import annotations

import abc
import dataclasses
import difflib
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from diffalign import components
from diffalign.data.pairs.columns import KNOWN_NAMES, PICKAPIC_PAIRS_PER_PROMPT, PairColumns
from diffalign.data.pairs.groups import GroupColumns, GroupRows, GroupStream
from diffalign.data.pairs.records import ImagePair, LeftOut, Skipped, UnusableRowError
from diffalign.data.rows import AbstractRows, AbstractRowStream, Row, Schema
from diffalign.data.source import DataConfig
from diffalign.errors import ConfigError, DataError

Form = Literal["table", "lines", "list", "shards", "sides"]
"""Parquet, Arrow or a hub data set; JSON lines; JSON lists; tar shards; one folder a side."""

_SUFFIXES: Mapping[str, Form] = {
    ".parquet": "table",
    ".arrow": "table",
    ".jsonl": "lines",
    ".tar": "shards",
    ".json": "list",
}
_SIDES = (("win", "lose"), ("chosen", "rejected"), ("win",), ("chosen",))
"""Folders of images, the preferred ones first; they may be alone."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"(?P<split>.+)-\d{5,}-of-\d{5,}(-[0-9a-f]+)?")
_SPLITS = frozenset({"train", "validation", "valid", "val", "dev", "eval", "test"})


class DataLocation(Protocol):
    """What a section of the config says about where its data lies."""

    @property
    def section(self) -> str:
        """The name of the section, for messages."""

    @property
    def path(self) -> str:
        """A file, a folder, a glob pattern, or a hub id."""

    @property
    def split(self) -> str:
        """Of a hub data set, or of a folder whose file names carry one."""

    @property
    def revision(self) -> str | None:
        """Of a hub data set."""


@dataclass(frozen=True, kw_only=True)
class Location:
    """What lies at a path, before a row of it is read."""

    path: str
    """As the config has it."""
    form: Form
    files: tuple[Path, ...] = ()
    """In order; empty for a hub data set, one folder a side for `sides`."""
    root: Path | None = None
    """Folder that sample ids and relative image paths start from; None on the hub."""

    def describe(self) -> str:
        """For example `pairs: 3 parquet files`."""
        if self.root is None:
            return f"{self.path} on the hub"
        if self.form == "sides":
            s = "s" if len(self.files) > 1 else ""
            return f"{self.path}: folder{s} {' and '.join(file.name for file in self.files)}"
        count = len(self.files)
        kind, s = self.files[0].suffix.lower()[1:], "s" if count > 1 else ""
        return f"{self.path}: {count} {kind} file{s}"


@dataclass(frozen=True, kw_only=True)
class OpenedData:
    """A data set that a reader has opened."""

    rows: AbstractRows | AbstractRowStream
    columns: PairColumns
    base: Path | None
    """Folder that relative image paths start from."""
    summary: str
    """What is read by what, and the mapping, as a sentence."""
    fingerprint: str
    """Another one for other data; the same wherever the data lies."""

    def pairs(self) -> Iterator[ImagePair | Skipped]:
        """Every row that should hold a preference, once and in order."""
        rows = self.rows
        if isinstance(rows, AbstractRowStream):
            in_order = (row for _, row in rows.rows())
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
    def schema(self, location: Location, config: DataConfig) -> Schema:
        """The columns of a data set, from its description or its first rows."""

    @abc.abstractmethod
    def match(self, schema: Schema, config: DataConfig) -> PairColumns | GroupColumns | None:
        """The mapping for a data set with these columns; None where it is another layout."""

    @abc.abstractmethod
    def open(
        self, location: Location, columns: PairColumns | GroupColumns, config: DataConfig
    ) -> AbstractRows | AbstractRowStream:
        """The rows, at random or streamed."""


def locate(
    config: DataLocation,
    *,
    suffixes: Mapping[str, Form] = _SUFFIXES,
    sides: Sequence[tuple[str, ...]] = _SIDES,
) -> Location:
    """Find files of one form at `config.path`, or take it for a hub id.

    Args:
        config: where to look.
        suffixes: the files that are looked for, those of a folder in this order.
        sides: names of folders of images that make a data set.

    Raises:
        DataError: nothing is there, or nothing that a reader knows.
    """
    path = Path(config.path).expanduser()
    if path.is_dir():
        return _in_folder(path, config, suffixes, sides)
    if path.is_file():
        return _of_files([path], path.parent, config, suffixes)
    if glob.has_magic(config.path):
        return _of_pattern(path, config, suffixes)
    if _HUB_ID.fullmatch(config.path) and path.suffix not in suffixes:
        return Location(path=config.path, form="table")
    raise DataError(
        f"{config.section}.path {config.path} does not exist. Give a file, a folder, a glob "
        "pattern, or the id of a hub data set (owner/name)"
    )


def _of_pattern(pattern: Path, config: DataLocation, suffixes: Mapping[str, Form]) -> Location:
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    root = Path(*fixed)
    found = sorted(root.glob(str(pattern.relative_to(root))))
    if not found:
        raise DataError(f"{config.section}.path {config.path}: no file matches this pattern")
    return _of_files(found, root, config, suffixes)


def _in_folder(
    folder: Path,
    config: DataLocation,
    suffixes: Mapping[str, Form],
    all_sides: Sequence[tuple[str, ...]],
) -> Location:
    for sides in all_sides:
        folders = tuple(folder / side for side in sides)
        if all(side.is_dir() for side in folders):
            return Location(path=config.path, form="sides", files=folders, root=folder)
    everything = sorted(_visible_files(folder))
    for suffix in suffixes:
        files = [file for file in everything if file.suffix.lower() == suffix]
        if files:
            return _of_files(_of_split(files, folder, config), folder, config, suffixes)
    or_sides = " or ".join("/ and ".join(sides) + "/" for sides in all_sides)
    raise DataError(
        f"{config.section}.path {config.path} is a folder without {', '.join(suffixes)} files"
        + (f", and without the folders {or_sides}" if all_sides else "")
    )


def _visible_files(folder: Path) -> Iterator[Path]:
    """The files of a folder at any depth, without hidden ones such as a Mac's `._x.parquet`."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _of_files(
    files: list[Path], root: Path, config: DataLocation, suffixes: Mapping[str, Form]
) -> Location:
    found = {file.suffix.lower() for file in files}
    if len(found) != 1 or not found <= set(suffixes):
        raise DataError(
            f"{config.section}.path {config.path} has files of type "
            f"{', '.join(sorted(found)) or 'none'}; they must all be of one of "
            f"{', '.join(suffixes)}"
        )
    return Location(path=config.path, form=suffixes[found.pop()], files=tuple(files), root=root)


def _of_split(files: list[Path], folder: Path, config: DataLocation) -> list[Path]:
    """The files of `config.split`, where file or folder names carry splits; else all of them."""
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    named = {split for split in splits.values() if split is not None}
    if not named:
        parts = {file: set(re.split(r"[^a-z0-9]+", file.stem.lower())) for file in files}
        if not any(config.split in each for each in parts.values()):
            return files
        others = _SPLITS - {config.split}  # as of `mine_train.jsonl` next to `mine_test.jsonl`
        return [file for file in files if config.split in parts[file] or not parts[file] & others]
    chosen = [file for file in files if splits[file] == config.split]
    if not chosen:
        raise DataError(
            f"{config.section}.split {config.split}: the files under {config.path} belong to the "
            f"splits {', '.join(sorted(named))}"
        )
    return chosen


def _split_of(file: Path) -> str | None:
    shard = _SHARD.fullmatch(file.stem)
    if shard is not None and shard["split"] != "data":  # as save_to_disk names all of them
        return shard["split"]
    parts = (part.lower() for part in (file.stem, *file.parts[:-1]))
    return next((part for part in parts if part in _SPLITS), None)


def open_data(config: DataConfig) -> OpenedData:
    """Find the data, choose its reader, and open it.

    Raises:
        DataError: nothing is there, or no reader understands it.
        ConfigError: there is no such `data.kind`, or several would do.
    """
    location = locate(config)
    kind, reader, schema, found = _choose(location, config)
    found = _as_configured(found, config)
    rows = reader.open(location, found, config)
    if isinstance(found, PairColumns):
        columns = found
    else:
        columns = found.pairs()
        if isinstance(rows, AbstractRowStream):
            rows = GroupStream(rows, found)
        else:
            rows = GroupRows(rows, found)
    if config.buckets and isinstance(rows, AbstractRowStream):
        raise DataError(
            f"data.buckets needs every image's size in advance, and {location.describe()} is "
            "streamed: set data.buckets to false"
        )
    streamed = ", streamed" if isinstance(rows, AbstractRowStream) else ""
    return OpenedData(
        rows=rows,
        columns=columns,
        base=location.root,
        summary=f"{location.describe()}, read by {kind}{streamed}: {found.describe()}"
        f"{_unread(schema, found)}{_set_aside(rows)}",
        fingerprint=fingerprint(location, config),
    )


def _unread(schema: Schema, columns: PairColumns | GroupColumns) -> str:
    """The columns that nobody reads, by name."""
    left = [name for name in schema.names if name not in columns.all()]
    return f"; not read: {', '.join(left)}" if left else ""


def _set_aside(rows: AbstractRows | AbstractRowStream) -> str:
    aside = rows.set_aside if isinstance(rows, AbstractRows) else ""
    return f"; set aside: {aside}" if aside else ""


def _as_configured(
    columns: PairColumns | GroupColumns, config: DataConfig
) -> PairColumns | GroupColumns:
    """The mapping with the config's wishes for ties and weights."""
    if config.weighting == "per_prompt" and columns.pairs_per_prompt is None:
        raise DataError(
            f"data.weighting per_prompt needs the column {PICKAPIC_PAIRS_PER_PROMPT}, which "
            f"{config.path} has not: set it to uniform"
        )
    counted = columns.pairs_per_prompt if config.weighting == "per_prompt" else None
    return dataclasses.replace(columns, keep_ties=config.ties == "keep", pairs_per_prompt=counted)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a link that leads nowhere or in a circle
        return 0


def fingerprint(location: Location, config: DataLocation) -> str:
    """Names and sizes of the files that are not hidden; of a hub data set, id and revision."""
    if location.root is None:
        return f"{config.path}@{config.revision or 'main'}"
    folders = [place.iterdir() if place.is_dir() else [place] for place in location.files]
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(itertools.chain.from_iterable(folders)):
        if not file.name.startswith("."):
            name = file.relative_to(location.root).as_posix()
            digest.update(os.fsencode(f"{name}\0{_size(file)}\0"))
    return digest.hexdigest()


def _choose(
    location: Location, config: DataConfig
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
