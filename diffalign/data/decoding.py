"""Encoded images to RGB. Every way in which a file can be unusable has a name."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from diffalign.data.records import EncodedImage, SkipReason


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
    image = _open(encoded, max_pixels)
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
    image = _open(encoded, max_pixels)
    turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 swap the axes
    return (image.width, image.height) if turned else (image.height, image.width)


def _open(encoded: EncodedImage, max_pixels: int) -> Image.Image:
    content = _content(encoded)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
    except Image.DecompressionBombError as error:
        raise BadImageError(SkipReason.TOO_LARGE, str(error)) from error
    except UnidentifiedImageError:
        start = bytes(content[:8]).hex(" ")
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


def _content(encoded: EncodedImage) -> bytes:
    if encoded is None:
        raise BadImageError(SkipReason.MISSING_IMAGE, "the data set has none in this row")
    if isinstance(encoded, Path):
        try:
            encoded = encoded.read_bytes()
        except OSError as error:
            raise BadImageError(SkipReason.MISSING_IMAGE, str(error)) from error
    if not encoded:
        raise BadImageError(SkipReason.EMPTY_FILE, "0 bytes")
    return encoded


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256, "L")  # `convert` would clip at 255
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
