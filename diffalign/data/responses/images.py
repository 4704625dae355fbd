"""Images as data sets hold them: bytes, {bytes, path}, base64, or file names."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.data.records import EncodedImage

_BASE64 = re.compile(
    r"(?:data:image/[\w.+-]+;base64,)?((?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk)[\w+/\s]+=*)\s*"
)
"""As JPEG, PNG, GIF, WebP and BMP begin. A file name has a dot, which base64 has not."""
_FILE_NAME = re.compile(r".+\.(?:jpe?g|png|gif|webp|bmp|tiff?)", re.IGNORECASE)


def images_of(value: Any, folder: Path | None) -> tuple[EncodedImage, ...]:
    """A column's images: those of a list, or the only one.

    Args:
        value: one image or a list of them, each as bytes, {bytes, path}, base64 or a file name;
            an image that is null stays, as None.
        folder: from which relative file names start; None for the current one.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_image(image, folder) for image in values)


def looks_like_images(value: Any) -> bool:
    """Whether a column that begins with this value seems to be one of images."""
    first = next(iter(value), None) if isinstance(value, (list, tuple)) else value
    if isinstance(first, str):
        return bool(_BASE64.fullmatch(first) or _FILE_NAME.fullmatch(first))
    return isinstance(first, bytes) or (isinstance(first, Mapping) and "bytes" in first)


def _image(value: Any, folder: Path | None) -> EncodedImage:
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if not isinstance(value, str):
        return value
    encoded = _BASE64.fullmatch(value)
    if encoded is not None:
        try:
            return base64.b64decode(encoded[1])
        except binascii.Error:
            return value.encode()  # its decoder will say that this is no image
    if not value:
        return None
    return Path(value) if folder is None else folder / value
