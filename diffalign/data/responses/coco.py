"""COCO's names for its images: one number, spelled in many ways.

The number of an image is the same in the releases of 2014 and 2017 and unique over their splits, so
`139`, `"139"`, `000000000139`, `000000000139.jpg`, `COCO_val2014_000000000139.jpg` and
`val2014/COCO_val2014_000000000139.jpg` are all the same image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_SPELLED = re.compile(
    r"(?:.*[/\\])?(?:COCO_(?:train|val|test)\d{4}_)?(\d{1,12})(?:\.(?:jpe?g|png))?",
    re.IGNORECASE,
)
_FILE = re.compile(
    r"(?:.*[/\\])?(?:COCO_(?:train|val|test)\d{4}_\d{12}|\d{12})(?:\.(?:jpe?g|png))?",
    re.IGNORECASE,
)
_SPLITS = ("train2014", "val2014", "test2014", "test2015")
_FOLDERS = ("", *_SPLITS, "train2017", "val2017", "test2017")


def image_number(name: object) -> int | None:
    """The number that a spelling of COCO represents; None for what is no such spelling.

    Args:
        name: a number (also as a float, as tables with gaps have it), or text with the number,
            perhaps padded, as a file name or a path.
    """
    if isinstance(name, bool):
        return None
    if isinstance(name, float):
        return int(name) if name.is_integer() and name >= 0 else None
    if isinstance(name, int):
        return name if name >= 0 else None
    found = _SPELLED.fullmatch(name.strip()) if isinstance(name, str) else None
    return int(found[1]) if found else None


def is_file_name(name: str) -> bool:
    """Whether a name is COCO's for certain: with its prefix, or with twelve digits."""
    return _FILE.fullmatch(name.strip()) is not None


def file_names(number: int) -> list[str]:
    """Names of the file of an image: COCO's, and those of others who kept its number."""
    return [
        *(f"COCO_{split}_{number:012d}.jpg" for split in _SPLITS),
        f"{number:012d}.jpg",
        f"{number}.jpg",
        f"{number:012d}.png",
        f"{number}.png",
    ]


def find_image(folder: Path | None, number: int) -> Path | None:
    """The file of an image in a folder or in COCO's own folders below it; None if none is there.

    Args:
        folder: None for the current one.
        number: of the image.
    """
    if number >= 10**12:
        return None
    root = Path() if folder is None else folder
    candidates = (root / below / name for below in _FOLDERS for name in file_names(number))
    return next((path for path in candidates if path.is_file()), None)


def image_file(folder: Path, name: str) -> Path:
    """The file of a name, or of another spelling of it that COCO has; the name's own if neither is
    there."""
    path = folder / name
    number = image_number(name)
    if number is None or path.is_file():
        return path
    return find_image(folder, number) or path


class KnownIds:
    """Ids of images in any of COCO's spellings -> the spelling that a file of truths has.

    An id that is spelled alike is that one; otherwise the number decides, where one id alone has
    it.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        self._ids = dict.fromkeys(ids)
        self._by_number: dict[int, str | None] = {}
        for name in self._ids:
            number = image_number(name)
            if number is not None:
                self._by_number[number] = None if number in self._by_number else name

    def find(self, name: object) -> str | None:
        """The known id that a spelling means; None if there is none, or more than one."""
        if str(name) in self._ids:
            return str(name)
        number = image_number(name)
        return None if number is None else self._by_number.get(number)

    def examples(self, count: int = 5) -> str:
        """The first ids, for a message."""
        more = ", ..." if len(self._ids) > count else ""
        return ", ".join(list(self._ids)[:count]) + more
