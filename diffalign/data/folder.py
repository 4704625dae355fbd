"""Two folders, `win/` and `lose/` (or `chosen/` and `rejected/`), with one caption file a pair.

Images of a pair have one name, whatever their type: `win/0001.png` and `lose/0001.jpg`. The caption
is `0001.txt`, beside the preferred image, in `captions/`, or beside the two folders. The folder of
preferred images may be alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffalign.data.columns import PairColumns
from diffalign.data.groups import GroupColumns
from diffalign.data.reading import AbstractReader, Form, Location
from diffalign.data.rows import AbstractRows, Row, Schema
from diffalign.data.source import DataConfig
from diffalign.errors import DataError

_CAPTION = "caption file"


@dataclass(frozen=True, kw_only=True)
class Folder(AbstractReader):
    """A folder of images for each side."""

    form: ClassVar[Form] = "sides"
    needs: ClassVar[str] = (
        "the folders win/ and lose/ (or chosen/ and rejected/), or the first alone"
    )

    def schema(self, location: Location, config: DataConfig) -> Schema:
        return Schema((_CAPTION, *(folder.name for folder in location.files)))

    def match(self, schema: Schema, config: DataConfig) -> PairColumns:
        caption, *images = schema.names
        return PairColumns(
            prompt=caption, images=tuple(images), lower_is_better=bool(config.lower_is_better)
        )

    def open(
        self, location: Location, columns: PairColumns | GroupColumns, config: DataConfig
    ) -> AbstractRows:
        return _FolderRows(location)


class _FolderRows(AbstractRows):
    """One row for each name that stands in at least one of the folders."""

    def __init__(self, location: Location) -> None:
        assert location.root is not None
        self._captions = (location.files[0], location.root / "captions", location.root)
        self._sides = {folder.name: _images_by_name(folder) for folder in location.files}
        self._names = sorted(set().union(*self._sides.values()))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Row:
        name = self._names[index]
        images = {side: images.get(name) for side, images in self._sides.items()}
        return Row(name, {_CAPTION: self._caption(name), **images})

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def _caption(self, name: str) -> str:
        for folder in self._captions:
            file = folder / f"{name}.txt"
            if file.is_file():
                return file.read_text(encoding="utf-8", errors="replace")
        return ""


def _images_by_name(folder: Path) -> dict[str, Path]:
    """Everything that is no caption and not hidden: what is no image shall be listed as such."""
    images: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".txt" or file.name.startswith(".") or file.is_dir():
            continue
        if file.stem in images:
            raise DataError(
                f"{folder} holds {images[file.stem].name} and {file.name}: a pair is known by the "
                "name before the dot, which must occur once"
            )
        images[file.stem] = file
    return images
