"""The files or the hub data set at a path of the config, before a row of it is read."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal, Protocol, TypeVar

from diffalign.data.stores import StoredFile, find_files, is_address
from diffalign.errors import DataError
from diffalign.keys import hide

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
_NAMED = 5
"""How many of the names in a folder a message lists."""
_SPLITS = frozenset({"train", "validation", "valid", "val", "dev", "eval", "test"})


Name = TypeVar("Name", bound=PurePath)
File = TypeVar("File")


class DataLocation(Protocol):
    """What a section of the config says about where its data lies."""

    @property
    def section(self) -> str:
        """The name of the section, for messages."""

    @property
    def path(self) -> str:
        """A file, a folder, a glob pattern, the address of an object store, or a hub id."""

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
    """Folder that sample ids and relative image paths start from; None on the hub or in a store."""
    stored: tuple[StoredFile, ...] = ()
    """In order, where they lie in an object store."""

    def describe(self) -> str:
        """For example `pairs: 3 parquet files`."""
        if self.stored:
            count = len(self.stored)
            return f"{self.path}: {count} parquet file{'s' * (count > 1)} of an object store"
        if self.root is None:
            return f"{self.path} on the hub"
        if self.form == "sides":
            s = "s" if len(self.files) > 1 else ""
            return f"{self.path}: folder{s} {' and '.join(file.name for file in self.files)}"
        count = len(self.files)
        kind, s = self.files[0].suffix.lower()[1:], "s" if count > 1 else ""
        return f"{self.path}: {count} {kind} file{s}"


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
    if is_address(config.path):
        stored = find_files(config.path, ".parquet", section=config.section)
        chosen = _of_split({file.name: file for file in stored}, config)
        return Location(path=config.path, form="table", stored=tuple(chosen))
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
        "pattern, the address of an object store (s3://bucket/folder), or the id of a hub data "
        "set (owner/name)"
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
            chosen = _of_split({file.relative_to(folder): file for file in files}, config)
            return _of_files(chosen, folder, config, suffixes)
    or_sides = ", or ".join(" with ".join(f"{side}/" for side in sides) for sides in all_sides)
    names = sorted(entry.name for entry in folder.iterdir())
    held = ", ".join([*names[:_NAMED], *(["..."] if len(names) > _NAMED else [])])
    raise DataError(
        f"{config.section}.path {config.path} is a folder without {', '.join(suffixes)} files"
        + (f", and without folders named {or_sides}" if all_sides else "")
        + f". It holds: {held or 'nothing'}"
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


def _of_split(files: Mapping[Name, File], config: DataLocation) -> list[File]:
    """The files of `config.split`, where file or folder names carry splits; else all of them.

    Args:
        files: by their names below the folder.
        config: names folder and split.
    """
    splits = {name: _split_of(name) for name in files}
    named = {split for split in splits.values() if split is not None}
    if not named:
        parts = {name: set(re.split(r"[^a-z0-9]+", name.stem.lower())) for name in files}
        if not any(config.split in each for each in parts.values()):
            return list(files.values())
        others = _SPLITS - {config.split}  # as of `mine_train.jsonl` next to `mine_test.jsonl`
        return [
            file
            for name, file in files.items()
            if config.split in parts[name] or not parts[name] & others
        ]
    chosen = [file for name, file in files.items() if splits[name] == config.split]
    if not chosen:
        raise DataError(
            f"{config.section}.split {config.split}: the files under {hide(config.path)} belong to "
            f"the splits {', '.join(sorted(named))}"
        )
    return chosen


def other_splits(config: DataLocation, suffixes: Mapping[str, Form] = _SUFFIXES) -> list[str]:
    """The splits that file names of a folder carry, besides the one that is read; of a hub data
    set and of an object store none, for which the files would have to be asked for."""
    path = Path(config.path).expanduser()
    if is_address(config.path) or not path.is_dir():
        return []
    files = [file.relative_to(path) for file in _visible_files(path)]
    named = {_split_of(file) for file in files if file.suffix.lower() in suffixes}
    others = [name for name in named if name is not None and name != config.split]
    return sorted(others) if config.split in named else []


def _split_of(file: PurePath) -> str | None:
    shard = _SHARD.fullmatch(file.stem)
    if shard is not None and shard["split"] != "data":  # as save_to_disk names all of them
        return shard["split"]
    parts = (part.lower() for part in (file.stem, *file.parts[:-1]))
    return next((part for part in parts if part in _SPLITS), None)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a link that leads nowhere or in a circle
        return 0


def fingerprint(location: Location, config: DataLocation) -> str:
    """Names and sizes of the files that are not hidden; of a hub data set, id and revision."""
    digest = hashlib.blake2b(digest_size=8)
    for stored in location.stored:
        digest.update(f"{stored.name}\0{stored.size}\0".encode())
    if location.stored:
        return digest.hexdigest()
    if location.root is None:
        return f"{config.path}@{config.revision or 'main'}"
    folders = [place.iterdir() if place.is_dir() else [place] for place in location.files]
    for file in sorted(itertools.chain.from_iterable(folders)):
        if not file.name.startswith("."):
            name = file.relative_to(location.root).as_posix()
            digest.update(os.fsencode(f"{name}\0{_size(file)}\0"))
    return digest.hexdigest()
