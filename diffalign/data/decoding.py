"""Encoded images to RGB. Every way in which a file can be unusable has a name."""

from __future__ import annotations

import functools
import io
import warnings
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from diffalign.data.records import EncodedImage, SkipReason

_ORIENTATION = 0x0112
"""The EXIF tag."""

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
"""Those that are tried. Pillow knows more, of which some call other programs on a stranger's file
(PostScript)."""


class BadImageError(Exception):
    """An image that cannot be used, and why."""

    def __init__(self, reason: SkipReason, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it survives pickling between processes
        self.reason = reason
        self.detail = detail


def decode(encoded: EncodedImage, *, max_pixels: int) -> Image.Image:
    """The upright RGB image: rotated as its EXIF says, transparency over white.

    Raises:
        BadImageError: there is no image, it is damaged, or it has more than `max_pixels`.
    """
    with _file(encoded) as file:
        image = _open(file, max_pixels)
        try:
            return _rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # Pillow's decoders raise what their code happens to raise
            truncated = "truncated" in str(error).lower()
            reason = SkipReason.TRUNCATED if truncated else SkipReason.CORRUPT
            raise BadImageError(reason, f"{type(error).__name__}: {error}") from error


def upright_size(encoded: EncodedImage, *, max_pixels: int) -> tuple[int, int]:
    """(height, width) as `decode` would give it, from the header alone.

    Raises:
        BadImageError: the header already shows that the image cannot be used.
    """
    with _file(encoded) as file:
        image = _open(file, max_pixels)
        turned = image.getexif().get(_ORIENTATION, 1) >= 5  # 5 to 8 exchange the axes
    return (image.width, image.height) if turned else (image.height, image.width)


def _open(file: BinaryIO, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=_known_formats())
    except Image.DecompressionBombError as error:
        raise BadImageError(SkipReason.TOO_LARGE, str(error)) from error
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(8).hex(" ")
        raise BadImageError(
            SkipReason.CORRUPT, f"no known image format; it starts with {start}"
        ) from None
    except Exception as error:
        raise BadImageError(SkipReason.CORRUPT, f"{type(error).__name__}: {error}") from error
    if image.width * image.height > max_pixels:
        raise BadImageError(
            SkipReason.TOO_LARGE, f"{image.width}x{image.height} pixels, allowed are {max_pixels}"
        )
    return image


def _file(encoded: EncodedImage) -> BinaryIO:
    """The content as a file, of which the caller reads what it needs."""
    if encoded is None:
        raise BadImageError(SkipReason.MISSING_IMAGE, "the data set has none in this row")
    try:
        size = len(encoded) if isinstance(encoded, bytes) else encoded.stat().st_size
        if size == 0:
            raise BadImageError(SkipReason.EMPTY_FILE, "0 bytes")
        return io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded.open("rb")
    except OSError as error:
        raise BadImageError(SkipReason.MISSING_IMAGE, str(error)) from error


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256, "L")  # `convert` would clip at 255
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
