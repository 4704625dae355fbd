"""Images as data sets hold them: bytes, records, base64, file names, addresses, COCO's numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from diffalign.data.decoding import (
    BadImageError,
    EncodedImage,
    from_base64,
    is_base64,
    is_there,
    path_of,
)
from diffalign.data.responses import coco
from diffalign.data.responses.conversation import malformed, with_markers
from diffalign.data.responses.records import IMAGE, Conversation, Position, Turn
from diffalign.data.skipping import SkipReason, UnusableRowError

_FILE_NAME = re.compile(r".+\.(?:jpe?g|png|gif|webp|bmp|tiff?)", re.IGNORECASE)
_ADDRESS = re.compile(r"(data)(?=:)|(file)(?=:/)|[A-Za-z][A-Za-z0-9+.-]+(?=://)", re.IGNORECASE)
"""How an address begins; `C:` is a drive of Windows."""
_LOCAL = re.compile(r"file:(?://(?:localhost(?=/))?)?", re.IGNORECASE)
"""The part before the path in the address of a file."""
_ENCODED = ("bytes", "base64", "data")
_NAMED = ("path", "image", "image_url", "url", "file_name", "filename", "source")
"""Fields of a record that hold an image, and that say where it is: the first that is not null."""


def images_of(value: Any, folder: Path | None) -> tuple[EncodedImage, ...]:
    """A column's images: those of a list, or the only one.

    Args:
        value: one image or a list of them, each as for `image_of`.
        folder: from which relative file names start; None for the current one.

    Raises:
        UnusableRowError: see `image_of`.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(image_of(image, folder) for image in values)


def image_of(value: Any, folder: Path | None) -> EncodedImage:
    """An image as bytes or as the file that holds it; None for null and for an empty name.

    Args:
        value: bytes; base64; a file name; an address `file://` or `data:`; the number of an image
            of COCO; or a record with one of these as bytes, base64, path, url and the like.
        folder: from which relative file names start; None for the current one.

    Raises:
        UnusableRowError: it is an address on the network, a number without a file, no base64, or
            no image.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, Mapping):
        return _of_record(value, folder)
    if isinstance(value, (int, float)):
        number = coco.image_number(value)
        if number is None:
            raise malformed(f"expected an image, found {value!r:.60}")
        return _of_number(number, folder)
    if isinstance(value, str):
        return _of_text(value, folder)
    raise malformed(f"expected an image, found {value!r:.60}")


def looks_like_images(value: Any) -> bool:
    """Whether a column that begins with this value seems to be one of images."""
    first = next(iter(value), None) if isinstance(value, (list, tuple)) else value
    if isinstance(first, str):
        embedded = first.startswith("data:image/")
        return embedded or bool(is_base64(first) or _FILE_NAME.fullmatch(first))
    if isinstance(first, Mapping):
        fields = (first.get(name) for name in ("bytes", "path", "url"))
        return any(isinstance(f, bytes) or (f and looks_like_images(f)) for f in fields)
    return isinstance(first, bytes)


def conversation_of(
    turns: Sequence[Turn], column: Sequence[Any], folder: Path | None
) -> Conversation:
    """Turns with the images that they show, taken from their messages and from the row's column.

    A message's own image is where the message has it; a marker without one takes the next image
    of the column. Where no text has a marker, those of all images go in front of the first text of
    the user, as TRL puts them.

    Args:
        turns: of a mapping.
        column: what the row's column of images holds; empty where it has none.
        folder: from which relative file names start.

    Raises:
        UnusableRowError: an image cannot be had, messages and column name different ones, or there
            are not as many images as markers.
    """
    plain = tuple(replace(turn, images=()) for turn in turns)
    if not any(turn.images for turn in turns):
        images = images_of(list(column), folder)
        return Conversation(turns=with_markers(plain, len(images)), images=images)
    wanted = [image for t in turns for image in (t.images or (None,) * t.text.count(IMAGE))]
    column = [value for value in column if value is not None]
    own = [value for value in wanted if value is not None and not isinstance(value, Position)]
    if len(own) == len(wanted) and column:
        images = _agreeing(own, column, folder)
        return Conversation(turns=plain, images=images)
    named = {value.index for value in wanted if isinstance(value, Position)}
    rest = [value for index, value in enumerate(column) if index not in named]
    found: list[Any] = []
    for value in wanted:
        if isinstance(value, Position):
            if not 0 <= value.index < len(column):
                raise _unequal(f"a message shows image {value.index}, counted from 0", column)
            found.append(column[value.index])
        elif value is None:
            if not rest:
                raise _unequal(f"{len(wanted)} {IMAGE} in the prompt", [*column, *own])
            found.append(rest.pop(0))
        else:
            found.append(value)
    if rest:
        raise _unequal(f"{len(wanted)} {IMAGE} in the prompt", [*column, *own])
    return Conversation(turns=plain, images=images_of(found, folder))


def _agreeing(
    own: Sequence[Any], column: Sequence[Any], folder: Path | None
) -> tuple[EncodedImage, ...]:
    """The images of a column, where the messages name the very same ones."""
    alike = len(own) == len(column) and all(map(_same_image, own, column))
    if not alike:
        raise UnusableRowError(
            SkipReason.MARKERS,
            f"the messages hold their {len(own)} images, and the row has a column with "
            f"{len(column)} that are not the same: which of them belong to the row is unclear",
        )
    return images_of(list(column), folder)


def _same_image(one: Any, other: Any) -> bool:
    names = [_name(value) for value in (one, other)]
    return one == other or (None not in names and names[0] == names[1])


def _name(value: Any) -> str | None:
    """The last part of the file name that a value gives; None where it gives none."""
    if isinstance(value, Mapping):
        given = (value.get(name) for name in _NAMED)
        return next((_name(name) for name in given if name), None)
    if not isinstance(value, str) or value.startswith("data:"):
        return None
    return re.split(r"[/\\]", value)[-1]


def _unequal(what: str, images: Sequence[Any]) -> UnusableRowError:
    return UnusableRowError(SkipReason.MARKERS, f"{what}, and images in the row: {len(images)}")


def _of_record(record: Mapping[str, Any], folder: Path | None) -> EncodedImage:
    for name in _ENCODED:
        content = record.get(name)
        if content is not None:
            return _decoded(content) if isinstance(content, str) else image_of(content, folder)
    for name in _NAMED:
        if record.get(name) is not None:
            return image_of(record[name], folder)
    if {*_ENCODED, *_NAMED} & set(record):
        return None
    raise malformed(f"expected an image as a record with path, bytes or url, found {record!r:.60}")


def _of_number(number: int, folder: Path | None) -> Path:
    found = coco.find_image(folder, number)
    if found is None:
        names = coco.file_names(number)
        raise UnusableRowError(
            SkipReason.MISSING_IMAGE,
            f"the image is the number {number}, and {folder or 'the current folder'} has no file "
            f"that COCO's naming gives it, such as {names[0]} or {names[4]}, nor have train2014, "
            f"val2017 and so on below it: let responses.image_folder name the folder of COCO, or "
            f"write file names",
        )
    return found


def _of_text(value: str, folder: Path | None) -> EncodedImage:
    text = value.strip()
    if not text:
        return None
    if "\0" in text:
        raise malformed(f"the name of an image contains a NUL character: {text!r:.60}")
    if is_base64(text):
        return _decoded(text)
    if text.isdecimal() and len(text) <= 12:
        return _of_number(int(text), folder)
    address = _ADDRESS.match(text)
    if address is None:
        return _file(value, folder)
    if address[1]:
        header, _, content = text.partition(",")
        embedded = header.lower().endswith(";base64")
        return _decoded(unquote(content)) if embedded else unquote_to_bytes(content)
    if address[2]:
        return _file(unquote(_LOCAL.sub("", text, count=1)), folder)
    raise UnusableRowError(
        SkipReason.REMOTE,
        f"{_without_secrets(text)}: training reads images from files and downloads none. Download "
        f"it, write the name of the file in its place, and let responses.image_folder say where "
        f"the files are",
    )


def _without_secrets(address: str) -> str:
    """An address without user, password, and query, in which signatures are."""
    try:
        parts = urlsplit(address)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    except ValueError:
        return address.partition("?")[0][:60]


def _file(name: str, folder: Path | None) -> Path:
    path = path_of(name, folder)
    if coco.is_file_name(name) and not is_there(path):
        number = coco.image_number(name)
        found = None if number is None else coco.find_image(folder, number)
        return found or path
    return path


def _decoded(text: str) -> bytes:
    content = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return from_base64(content)
    except BadImageError as error:
        raise UnusableRowError(error.reason, error.detail) from None
