"""A folder of safetensors files that hold what was computed once, for any number of runs.

`index.json` says what the values are, all that they depend on, and how they are cut into files, the
shards. A shard names the folder that it belongs to and has a checksum of its header and one of its
tensors; it is written whole or not at all. So a computation that was killed goes on with what is
missing, one that is started again finds what was damaged since, and a run under other settings is
refused by the setting that differs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.commands import command
from diffalign.console import in_bytes
from diffalign.errors import CacheError
from diffalign.files import read_json, replacing_file, write_json, writing
from diffalign.parsing import checked, parse_json

INDEX = "index.json"
_ENTRY = "shard"
"""The one entry of a shard's metadata: their order in a file is up to chance."""
_LONGEST_HEADER = 1 << 32
_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a folder can hold."""

    name: str
    """In words: `reference values`."""
    setting: str
    """The key of a config that names such a folder."""
    unmarked: bool = False
    """Whether a folder that does not say what it holds holds these, without checksums: those that
    were written before there were several kinds."""

    def compute(self, folder: Path) -> str:
        """The command that fills a folder, or goes on with it."""
        return command("precompute", {self.setting: folder}, config="CONFIG.yaml")

    @property
    def compute_others(self) -> str:
        """What to do about a folder of other settings than a run's, as a sentence."""
        return (
            f"Compute this run's own with diffalign precompute CONFIG.yaml "
            f"{self.setting}=ANOTHER_FOLDER, or remove the folder and compute it again"
        )


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What the shards of a folder share."""

    fingerprint: Mapping[str, Any]
    """Everything that the values depend on, by key: plain JSON values."""
    layout: Mapping[str, Any]
    """How they are cut into shards, by key: plain JSON values."""

    def digest(self, kind: Kind) -> str:
        """Another one for other values, or for other shards."""
        text = json.dumps([kind.name, self.fingerprint, self.layout], sort_keys=True)
        return _hash(text.encode())

    def plain(self) -> Identity:
        """As a file gives it back: tuples are lists there."""
        return Identity(
            fingerprint=json.loads(json.dumps(self.fingerprint)),
            layout=json.loads(json.dumps(self.layout)),
        )


class ShardWriter:
    """Fills a folder; whatever stops it, the shards that are there are whole."""

    def __init__(self, folder: Path, kind: Kind, identity: Identity, shards: Sequence[str]) -> None:
        """Begin, or go on with what was started.

        Args:
            folder: created.
            kind: of its values.
            identity: of its values.
            shards: names of all its files.

        Raises:
            CacheError: the folder holds other values than these.
            DataError: the disk refuses.
        """
        self.folder, self.kind, self.shards = folder, kind, tuple(shards)
        self.identity = identity.plain()
        self._digest = self.identity.digest(kind)
        self._unmarked = False
        if (folder / INDEX).exists():
            there, self._unmarked = _read_index(folder, kind)
            for found, ours in (
                (there.fingerprint, self.identity.fingerprint),
                (there.layout, self.identity.layout),
            ):
                _refuse_difference(folder, kind, found, ours, keys=[*ours, *found])
            return
        content = {"holds": kind.name, "digest": self._digest, **vars(self.identity)}
        with writing(folder):
            write_json(folder / INDEX, content)

    def missing(self) -> list[str]:
        """The shards still to be written: those that are absent, cut, damaged, or not of this
        folder. It reads all that is there, to see whether it is as it was written."""
        return [name for name in self.shards if not self.is_whole(name)]

    def is_whole(self, name: str) -> bool:
        """Whether a shard is there, and as it was written; reads all of it."""
        try:
            _verify(self.folder / name, None if self._unmarked else self._digest)
        except CacheError:
            return False
        return True

    def write(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Write a shard.

        Args:
            name: one of `shards`.
            tensors: by name, of any device and dtype.
            metadata: plain JSON values that are read back with it.

        Raises:
            DataError: the disk refuses.
        """
        assert name in self.shards
        entry = {
            "header": _PLACE_OF_HEADER,
            "tensors": _PLACE_OF_TENSORS,
            "folder": self._digest,
            "metadata": metadata or {},
        }
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        with writing(self.folder), replacing_file(self.folder / name) as draft:
            save_file(plain, draft, metadata={_ENTRY: json.dumps(entry)})
            _seal(draft)


SPARE_BYTES = 1 << 28
"""What has to stay free on the disk."""


def check_room(folder: Path, needed: int, *, less: str) -> None:
    """Raise CacheError unless the disk has room.

    Args:
        folder: of the shards; it need not exist.
        needed: bytes still to be written.
        less: how they would be fewer.
    """
    there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    free = shutil.disk_usage(there).free
    if needed + SPARE_BYTES > free:
        raise CacheError(
            f"{folder} would take {in_bytes(needed)} ({needed:,} bytes), and the disk has "
            f"{in_bytes(free)} free, of which {in_bytes(SPARE_BYTES)} stay free: make room, choose "
            f"a folder on another disk, or take less: {less}"
        )


class OpenShard:
    """A shard, mapped into memory: what is not asked for is not read."""

    def __init__(self, path: Path, kind: Kind, file: Any, metadata: Mapping[str, Any]) -> None:
        """Use `ShardReader.open`; this takes the parts."""
        self.path, self.metadata = path, metadata
        self._kind, self._file = kind, file
        self.names = frozenset(file.keys())

    def tensor(self, name: str) -> Tensor:
        """One of its tensors, on the CPU.

        Raises:
            CacheError: it has none of this name.
        """
        with _told_of_damage(self.path, self._kind), _as_cache_error(self.path):
            tensor: Tensor = self._file.get_tensor(name)
            return tensor


class ShardReader:
    """Reads a folder that `ShardWriter` filled, shard by shard, as they are asked for."""

    def __init__(self, folder: Path, kind: Kind, fingerprint: Mapping[str, Any]) -> None:
        """Read the index, and nothing else.

        Args:
            folder: of the values.
            kind: that they must be.
            fingerprint: of this run; what it has no key for does not matter to it.

        Raises:
            CacheError: there is none, it holds something else, or its values belong to other
                settings than this run's; the first that differs is named.
        """
        self.folder, self.kind = folder, kind
        self.identity, unmarked = _read_index(folder, kind)
        self._digest = None if unmarked else self.identity.digest(kind)
        ours = Identity(fingerprint=fingerprint, layout={}).plain().fingerprint
        _refuse_difference(folder, kind, self.identity.fingerprint, ours, keys=[*ours])

    def check(self, shards: Sequence[str]) -> None:
        """Look at the headers of these files, and at their sizes; no tensor is read.

        Raises:
            CacheError: one is missing, cut, damaged in its header, or not of this folder.
        """
        missing = [name for name in shards if not (self.folder / name).is_file()]
        if missing:
            raise CacheError(
                f"{self.folder} is not complete: {len(missing)} of {len(shards)} files are "
                f"missing. Finish it with the command that began it, "
                f"{self.kind.compute(self.folder)}"
            )
        for name in shards:
            with self.told_of_damage(name):
                _verify(self.folder / name, self._digest, tensors=False)

    def open(self, name: str) -> OpenShard:
        """One of its files, after a look at its header.

        Raises:
            CacheError: see `check`.
        """
        path = self.folder / name
        with self.told_of_damage(name):
            metadata = _verify(path, self._digest, tensors=False)
            with _as_cache_error(path):
                return OpenShard(path, self.kind, safe_open(path, framework="pt"), metadata)

    def read(self, name: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """All tensors of a file by name, and its metadata, after its checksum was compared.

        Raises:
            CacheError: see `check`; also where its tensors are damaged.
        """
        with self.told_of_damage(name):
            _verify(self.folder / name, self._digest)
        shard = self.open(name)
        return {key: shard.tensor(key) for key in sorted(shard.names)}, shard.metadata

    def told_of_damage(self, name: str) -> Any:
        """Within this context a CacheError about a shard says how to have it written anew."""
        return _told_of_damage(self.folder / name, self.kind)


@dataclass(frozen=True, kw_only=True)
class _IndexFile:
    holds: str
    digest: str
    fingerprint: dict[str, Any]
    layout: dict[str, Any]


def _read_index(folder: Path, kind: Kind) -> tuple[Identity, bool]:
    """What a folder holds, and whether its files may be without checksums."""
    path = folder / INDEX
    if not path.is_file():
        raise CacheError(f"{folder} holds no {kind.name}: compute them with {kind.compute(folder)}")
    content = read_json(path, error=CacheError)
    unmarked = kind.unmarked and isinstance(content, dict) and "holds" not in content
    if unmarked:
        fingerprint = content.pop("fingerprint", None)
        content = {"holds": kind.name, "digest": "", "fingerprint": fingerprint, "layout": content}
    try:
        found = checked(_IndexFile, content, path, error=CacheError)
    except CacheError as error:
        raise CacheError(f"{path} is no index of {kind.name}: {error}") from error
    if found.holds != kind.name:
        raise CacheError(
            f"{folder} holds {found.holds}, not {kind.name}: give {kind.setting} another folder"
        )
    identity = Identity(fingerprint=found.fingerprint, layout=found.layout)
    if not unmarked and identity.digest(kind) != found.digest:
        raise CacheError(
            f"{path} is damaged: it is not as it was written. Remove this file, and write it anew "
            f"with {kind.compute(folder)}; what else is there and belongs to it stays"
        )
    return identity, unmarked


def _refuse_difference(
    folder: Path, kind: Kind, there: Mapping[str, Any], ours: Mapping[str, Any], *, keys: list[str]
) -> None:
    for key in keys:
        if there.get(key) != ours.get(key):
            raise CacheError(
                f"{folder} was computed under other settings: {key} was {there.get(key)!r} there "
                f"and is {ours.get(key)!r} here. {kind.compute_others}"
            )


# A shard is an ordinary safetensors file. The one entry of its metadata begins with two checksums:
# that of the header, taken with a placeholder where it stands itself, and that of all behind it.


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


_PLACE_OF_HEADER, _PLACE_OF_TENSORS = "h" * len(_hash(b"")), "t" * len(_hash(b""))


def _seal(path: Path) -> None:
    """Put the checksums in their places."""
    with path.open("r+b") as file:
        header = _header(file)
        header = header.replace(_PLACE_OF_TENSORS.encode(), _hash_of_rest(file).encode(), 1)
        header = header.replace(_PLACE_OF_HEADER.encode(), _hash(header).encode(), 1)
        file.seek(8)
        file.write(header)


def _verify(path: Path, digest: str | None, *, tensors: bool = True) -> Mapping[str, Any]:
    """The metadata of a shard.

    Args:
        path: of the file.
        digest: of its folder; None takes files without checksums as well.
        tensors: whether all of it is read and compared, or its header and its size alone.

    Raises:
        CacheError: it is absent, cut, damaged, or not of this folder.
    """
    with _as_cache_error(path), path.open("rb") as file:
        with safe_open(path, framework="pt") as opened:  # knows how long the file has to be
            entries = opened.metadata() or {}
        if digest is None and _ENTRY not in entries:
            return {key: parse_json(text, path, error=CacheError) for key, text in entries.items()}
        entry = checked(
            _Entry, parse_json(entries[_ENTRY], path, error=CacheError), path, error=CacheError
        )
        header = _header(file)
        if _hash(header.replace(entry.header.encode(), _PLACE_OF_HEADER.encode(), 1)) != (
            entry.header
        ):
            raise CacheError("its header is not as it was written")
        if digest is not None and entry.folder != digest:
            raise CacheError("it belongs to another folder")
        if tensors and _hash_of_rest(file) != entry.tensors:
            raise CacheError("its tensors are not as they were written")
    return entry.metadata


@dataclass(frozen=True, kw_only=True)
class _Entry:
    header: str
    tensors: str
    folder: str
    metadata: dict[str, Any]


def _header(file: BinaryIO) -> bytes:
    length = int.from_bytes(file.read(8), "little")
    return file.read(min(length, _LONGEST_HEADER))


def _hash_of_rest(file: BinaryIO) -> str:
    digest = hashlib.blake2b(digest_size=16)
    while part := file.read(_AT_ONCE):
        digest.update(part)
    return digest.hexdigest()


@contextmanager
def _as_cache_error(path: Path) -> Iterator[None]:
    """Raise CacheError for whatever a file can be in place of a shard."""
    try:
        yield
    except CacheError:
        raise
    except Exception as problem:  # a header can name types, shapes and places that do not exist
        raise CacheError(f"it cannot be read: {type(problem).__name__}: {problem}") from problem


@contextmanager
def _told_of_damage(path: Path, kind: Kind) -> Iterator[None]:
    try:
        yield
    except CacheError as error:
        raise CacheError(
            f"{path} is damaged ({error}): have it found and computed again with "
            f"{kind.compute(path.parent)}"
        ) from error
