"""Two folders, `win/` and `lose/` (or `chosen/` and `rejected/`), with one caption file a pair.

Images of a pair have one name, whatever their type: `win/0001.png` and `lose/0001.jpg`. The caption
is `0001.txt` (or `0001.caption`), next to the preferred image, in `captions/`, or next to the two
folders. The folder of preferred images may be alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffalign.data.decoding import IMAGE_SUFFIXES, starts_like_an_image
from diffalign.data.location import Form, Location
from diffalign.data.pairs.columns import PairColumns
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import AbstractReader
from diffalign.data.pairs.groups import GroupColumns
from diffalign.data.rows import AbstractRows, Row, Schema
from diffalign.errors import DataError
from diffalign.parsing import decode_text

_CAPTION = "caption file"


@dataclass(frozen=True, kw_only=True)
class Folder(AbstractReader):
    """A folder of images for each side."""

    form: ClassVar[Form] = "sides"
    needs: ClassVar[str] = (
        "the folders win/ and lose/ (or chosen/ and rejected/), or the first alone"
    )

    def schema(self, location: Location, config: PairConfig) -> Schema:
        return Schema((_CAPTION, *(folder.name for folder in location.files)))

    def match(self, schema: Schema, config: PairConfig) -> PairColumns:
        caption, *images = schema.names
        return PairColumns(
            prompt=caption, images=tuple(images), lower_is_better=bool(config.lower_is_better)
        )

    def open(
        self, location: Location, columns: PairColumns | GroupColumns, config: PairConfig
    ) -> AbstractRows:
        return _FolderRows(location)


class _FolderRows(AbstractRows):
    """One row for each name that is in at least one of the folders."""

    def __init__(self, location: Location) -> None:
        assert location.root is not None
        places = (location.files[0], location.root / "captions", location.root)
        self._captions = [_captions_by_name(folder) for folder in places]
        aside: list[Path] = []
        self._sides = {folder.name: _images_by_name(folder, aside) for folder in location.files}
        self._names = sorted(set().union(*self._sides.values()))
        self.set_aside = _in_words([file.relative_to(location.root) for file in aside])

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Row:
        name = self._names[index]
        images = {side: images.get(name) for side, images in self._sides.items()}
        try:
            return Row(name, {_CAPTION: self._caption(name), **images})
        except (DataError, OSError) as error:
            return Row(name, {_CAPTION: None, **images}, problem=f"caption: {error}")

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def _caption(self, name: str) -> str:
        for captions in self._captions:
            if name in captions:
                return decode_text(captions[name].read_bytes(), captions[name])
        return ""


_CAPTIONS = (".txt", ".caption")
_IMAGES = IMAGE_SUFFIXES | {".heic", ".heif", ".jxl"}
"""A file of one of these names is meant to be an image: one that cannot be read is listed."""


def _precedence(file: Path) -> int:
    """Of two captions of one name, the one with the smaller number is read."""
    return [*_CAPTIONS, file.suffix.lower()].index(file.suffix.lower())


def _captions_by_name(folder: Path) -> dict[str, Path]:
    """Caption files by the name before the dot; none where there is no such folder."""
    if not folder.is_dir():
        return {}
    files = sorted(folder.iterdir(), key=lambda file: (_precedence(file), file.name), reverse=True)
    return {
        file.stem: file
        for file in files
        if file.suffix.lower() in _CAPTIONS and not file.name.startswith(".") and file.is_file()
    }


def _images_by_name(folder: Path, aside: list[Path]) -> dict[str, Path]:
    """Images by the name before the dot; what is neither image nor caption is added to `aside`.

    Hidden files are passed over, such as the `.DS_Store` and `._0001.png` of a Mac.
    """
    images: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        suffix = file.suffix.lower()
        if suffix in _CAPTIONS or file.name.startswith("."):
            continue
        if suffix not in _IMAGES and (file.is_dir() or not starts_like_an_image(file)):
            aside.append(file)
            continue
        name = file.stem if suffix in _IMAGES else file.name
        if name in images:
            raise DataError(
                f"{folder} holds {images[name].name} and {file.name}: a pair is known by the "
                "name before the dot, which must occur once"
            )
        images[name] = file
    return images


def _in_words(files: Sequence[Path]) -> str:
    """For example `3 files that are no images (win/Thumbs.db, win/a.json, ...)`."""
    if not files:
        return ""
    names = ", ".join(file.as_posix() for file in files[:3])
    more = ", ..." if len(files) > 3 else ""
    what = "that is no image" if len(files) == 1 else "that are no images"
    return f"{len(files):,} {what} ({names}{more})"
