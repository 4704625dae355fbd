"""WebDataset tar shards: files of one pair follow one another and share the name before the dot.

Members are named like the columns of the other readers, with or without a further ending:
`000017.jpg_0.jpg`, `000017.jpg_1.jpg`, `000017.label_0.txt`, `000017.label_1.txt` and
`000017.caption.txt`; or `.chosen.png`, `.rejected.png` and `.txt`. Preferred images alone may be
`000017.jpg` beside `000017.txt`, too. The fields of a `.json` member count as members. Needs the
extra `webdataset`.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffalign.data.columns import PairColumns
from diffalign.data.groups import GroupColumns, recognise
from diffalign.data.reading import AbstractReader, Form, Location
from diffalign.data.rows import AbstractRowStream, Cursor, Row, Schema
from diffalign.data.source import DataConfig
from diffalign.errors import DataError

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_ENDINGS = (*_PICTURES, ".txt", ".cls")


@dataclass(frozen=True, kw_only=True)
class WebDataset(AbstractReader):
    """One or more tar shards, streamed."""

    form: ClassVar[Form] = "shards"
    needs: ClassVar[str] = (
        "members jpg_0, jpg_1, label_0, label_1 and caption, or chosen, rejected and caption "
        "(each with or without an ending such as .jpg or .txt), or preferred images alone as chosen"
    )

    def schema(self, location: Location, config: DataConfig) -> Schema:
        for _, sample in _samples(location.files[0]):
            lists = frozenset(name for name, value in sample.items() if isinstance(value, list))
            return Schema(tuple(sample), lists)
        raise DataError(f"{location.files[0]} holds no samples")

    def match(self, schema: Schema, config: DataConfig) -> PairColumns | GroupColumns | None:
        return recognise(
            config.columns, schema, lower_is_better=config.lower_is_better, pickapic=True
        )

    def open(
        self, location: Location, columns: PairColumns | GroupColumns, config: DataConfig
    ) -> AbstractRowStream:
        return _ShardStream(location, columns)


class _ShardStream(AbstractRowStream):
    """Shards one after another; a cursor is a shard and a number of samples in it."""

    def __init__(self, location: Location, columns: PairColumns | GroupColumns) -> None:
        assert location.root is not None
        self._root = location.root
        self._files = location.files
        self._names = columns.all()

    def rows(self, start: Cursor | None = None) -> Iterator[tuple[Cursor, Row]]:
        start = start or {"shard": 0, "sample": 0}
        skip = start["sample"]
        for shard in range(start["shard"], len(self._files)):
            file = self._files[shard]
            place = file.relative_to(self._root).as_posix()
            for number, (key, sample) in enumerate(_samples(file)):
                if number >= skip:
                    values = {name: sample.get(name) for name in self._names}
                    yield {"shard": shard, "sample": number}, Row(f"{place}/{key}", values)
            skip = 0


def _samples(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(key, members by name) of one shard."""
    try:
        from webdataset.tariterators import tarfile_samples
    except ImportError as error:
        raise DataError(
            "tar shards need the package webdataset: pip install 'diffalign[webdataset]'"
        ) from error
    # An absolute path is never taken for a URL or a `pipe:` command.
    shard = [{"url": str(file.resolve())}]
    try:
        for sample in tarfile_samples(shard):
            yield sample["__key__"], _members(sample)
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise DataError(f"shard {file} cannot be read to its end: {error}") from error


def _members(sample: Mapping[str, Any]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, content in sample.items():
        if name == "json":
            members.update(json.loads(content))
        elif name == "txt":
            members["caption"] = content
        elif f".{name}" in _PICTURES:
            members["image"] = content
        elif not name.startswith("__"):
            ending = next((e for e in _ENDINGS if name.endswith(e)), "")
            members[name.removesuffix(ending)] = content
    return members
