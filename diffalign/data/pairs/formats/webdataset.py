"""WebDataset tar shards: files of one pair share the name before the first dot.

Members are named like the columns of the other readers, with or without a further ending:
`000017.jpg_0.jpg`, `000017.jpg_1.jpg`, `000017.label_0.txt`, `000017.label_1.txt` and
`000017.caption.txt`; or `.chosen.png`, `.rejected.png` and `.txt`. Preferred images alone may be
`000017.jpg` next to `000017.txt`, too. The fields of a `.json` member count as members. Files of
one pair need not follow one another: the headers of a shard are read before its contents.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from diffalign.data.location import Form, Location
from diffalign.data.pairs.columns import PairColumns
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import AbstractReader
from diffalign.data.pairs.groups import GroupColumns
from diffalign.data.pairs.recognition import recognise
from diffalign.data.rows import AbstractRowStream, Cursor, Row, Schema, object_schema
from diffalign.errors import DataError
from diffalign.parsing import parse_json

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_ENDINGS = (*_IMAGES, ".txt", ".cls", ".json")
_SCHEMA_SAMPLES = 16
"""Samples that are read to know the columns: not every one need have all of them."""


@dataclass(frozen=True, kw_only=True)
class WebDataset(AbstractReader):
    """One or more tar shards, streamed."""

    form: ClassVar[Form] = "shards"
    needs: ClassVar[str] = (
        "members jpg_0, jpg_1, label_0, label_1 and caption, or chosen, rejected and caption "
        "(each with or without an ending such as .jpg or .txt), or preferred images alone as chosen"
    )

    def schema(self, location: Location, config: PairConfig) -> Schema:
        first = [s.read().values for s in islice(_samples(location.files[0]), _SCHEMA_SAMPLES)]
        if not first:
            raise DataError(f"{location.files[0]} holds no samples")
        return object_schema(first)

    def match(self, schema: Schema, config: PairConfig) -> PairColumns | GroupColumns | None:
        return recognise(
            config.columns, schema, lower_is_better=config.lower_is_better, pickapic=True
        )

    def open(
        self, location: Location, columns: PairColumns | GroupColumns, config: PairConfig
    ) -> AbstractRowStream:
        return _ShardStream(location, columns)


class _ShardStream(AbstractRowStream):
    """Tar shards, each a part; a cursor is a number of samples in it.

    To go on inside a shard, its headers are read again, and no content of a sample before.
    """

    def __init__(self, location: Location, columns: PairColumns | GroupColumns) -> None:
        assert location.root is not None
        self._root = location.root
        self._files = location.files
        self._names = columns.all()

    @cached_property
    def parts(self) -> Sequence[int]:
        return [file.stat().st_size for file in self._files]

    @property
    def about_rows(self) -> int:
        samples = sum(1 for _ in _samples(self._files[0]))  # of headers alone
        return round(samples * sum(self.parts) / max(1, self.parts[0]))

    def rows(self, part: int, start: Cursor | None = None) -> Iterator[tuple[Cursor, Row]]:
        skip = 0 if start is None else start["sample"]
        file = self._files[part]
        place = file.relative_to(self._root).as_posix()
        for number, sample in enumerate(_samples(file)):
            if number >= skip:
                row = sample.read()
                values = {name: row.values.get(name) for name in self._names}
                yield {"sample": number}, Row(f"{place}/{row.name}", values, problem=row.problem)


@dataclass(frozen=True)
class _Sample:
    """The members of one sample, of which only the headers have been read."""

    shard: tarfile.TarFile
    name: str
    members: Mapping[str, tarfile.TarInfo]
    """By what is behind the first dot of their names, in lower case."""

    def read(self) -> Row:
        """The sample as a row; its name lacks that of the shard."""
        values: dict[str, Any] = {}
        problem = None
        plain = [name for name in self.members if f".{name}" in _IMAGES]
        for name in sorted(self.members, key=_precedence):
            content = self._content(self.members[name])
            ending = next((e for e in _ENDINGS if name.endswith(e)), "")
            try:
                if name == "json":
                    values |= _fields(content, self.members[name].name)
                elif name == "txt":
                    values["caption"] = content
                elif name in plain and len(plain) == 1:
                    values["image"] = content
                elif ending == ".json":
                    fields = parse_json(content, self.members[name].name)
                    values[name.removesuffix(ending)] = fields
                else:
                    values[name.removesuffix(ending)] = content
            except DataError as error:
                problem = str(error)
        return Row(self.name, values, problem=problem)

    def _content(self, member: tarfile.TarInfo) -> bytes:
        try:
            file = self.shard.extractfile(member)
            content = b"" if file is None else file.read()
        except (OSError, tarfile.TarError, KeyError) as error:
            raise _broken(self.shard, error) from error
        if len(content) != member.size:
            raise _broken(self.shard, f"{member.name} has {len(content)} of {member.size} bytes")
        return content


def _precedence(name: str) -> int:
    """What is in a member of its own is meant before what all of them have in common."""
    return {"json": 0, "txt": 1}.get(name, 2)


def _fields(content: bytes, where: str) -> dict[str, Any]:
    fields = parse_json(content, where)
    if not isinstance(fields, dict):
        raise DataError(f"{where} is no JSON object")
    return fields


def _samples(file: Path) -> Iterator[_Sample]:
    """The samples of one shard, in the order of their first members.

    The headers are read first, all of them: members of a sample need not follow one another.
    """
    try:
        with tarfile.open(file, "r:") as shard:
            for name, members in _by_sample(shard).items():
                yield _Sample(shard, name, members)
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise DataError(f"shard {file} cannot be read to its end: {error}") from error


def _by_sample(shard: tarfile.TarFile) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Members by sample and ending. A sample that has a member twice is two samples."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    times: Counter[str] = Counter()
    for member in shard:
        folder, _, base = member.name.replace("\\", "/").rpartition("/")
        stem, dot, ending = base.partition(".")
        if not (member.isfile() or member.islnk()) or not stem or not dot:
            continue  # a folder, a hidden file, or one without a name for its column
        key, ending = f"{folder}/{stem}".removeprefix("/").removeprefix("./"), ending.lower()
        name = f"{key}#{times[key]}" if times[key] else key
        if ending in samples.get(name, {}):
            times[key] += 1
            name = f"{key}#{times[key]}"
        samples.setdefault(name, {})[ending] = member
    _refuse_unfinished(shard)
    return samples


def _refuse_unfinished(shard: tarfile.TarFile) -> None:
    """Raise DataError where something other than the end follows the last readable header."""
    assert shard.fileobj is not None
    shard.fileobj.seek(shard.offset)
    rest = shard.fileobj.read(tarfile.BLOCKSIZE)
    if rest.strip(b"\0"):
        raise _broken(shard, f"no header of a member at byte {shard.offset:,}")


def _broken(shard: tarfile.TarFile, why: object) -> DataError:
    name = os.fsdecode(shard.name or "")
    return DataError(f"shard {name} cannot be read to its end: {why}")
