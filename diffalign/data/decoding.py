"""Encoded images to RGB. Every way in which a file can be unusable has a name."""

from __future__ import annotations

import base64
import binascii
import functools
import io
import re
import stat
import urllib.parse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

from diffalign.data.skipping import SkipReason

Size = tuple[int, int]
"""(height, width), pixels."""

EncodedImage = bytes | Path | None
"""A file's content, or where it lies; None where the data set has no image. Decoding waits for the
loader's workers, where a bad image can be skipped and listed."""

_ORIENTATION, _WIDTH, _HEIGHT = 0x0112, 0x0100, 0x0101
"""Tags of EXIF and TIFF."""

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
"""Those that are tried. Pillow knows more, of which some call other programs on a stranger's file
(PostScript)."""


MAX_PIXELS = 89_478_485
"""Larger images are not decoded, as decompression bombs: Pillow's threshold for a warning."""

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".avif",
        ".jp2",
        ".j2k",
        ".mpo",
    ]
)
"""Endings of files, in lower case, of the formats that are read."""

_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
)
"""First bytes of these formats; WebP and AVIF have theirs further on."""


_TRAILER = 64
"""Bytes at the end of a file in which its end is looked for: some programs write a few more."""


class BadImageError(Exception):
    """An image that cannot be used, and why."""

    def __init__(self, reason: SkipReason, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it survives pickling between processes
        self.reason = reason
        self.detail = detail


def encoded_image(value: Any, base: Path | None) -> EncodedImage:
    """What a column of images holds, as a file's content or as the path of a file.

    Args:
        value: bytes; a path, of which both separators are understood, or a `file://` address;
            base64, bare or as a `data:` address; the `{bytes, path}` of the datasets library with
            any of these; None.
        base: folder that relative paths start from; None for the working folder.

    Raises:
        BadImageError: it is none of these.
    """
    if isinstance(value, Mapping):
        if not {"bytes", "path"} & set(value):
            raise BadImageError(
                SkipReason.MALFORMED,
                f"an object of {', '.join(map(str, value)) or 'nothing'}, expected bytes or path",
            )
        content = value.get("bytes")
        return encoded_image(content if content is not None else value.get("path"), base)
    if value is None or isinstance(value, (bytes, Path)):
        return value
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return _named(value, base)
    raise BadImageError(
        SkipReason.MALFORMED,
        f"{type(value).__name__} {str(value)[:40]!r}, expected an image's bytes or path",
    )


_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):(?P<rest>//.*|.*)", re.I | re.S)
_BASE64 = re.compile(
    r"((/9j/|iVBORw0KGgo|R0lGOD|UklGR)[\w+/\s-]*|(Qk|SUkq|TU0A|AAAA)[\w+/\s-]{60,})=*\s*"
)
"""Base64 of the first bytes of the formats that are read; where these are few, with enough after
them to be no path. A file name has a dot, which base64 has not."""


def is_base64(text: str) -> bool:
    """Whether a text seems to be an image in base64, and no path."""
    return _BASE64.fullmatch(text) is not None


def from_base64(text: str) -> bytes:
    """The bytes that a text holds in base64, in either alphabet, with its padding or without.

    Raises:
        BadImageError: it is no base64.
    """
    plain = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImageError(SkipReason.CORRUPT, f"no base64: {error}") from None


def path_of(name: str, base: Path | None) -> Path:
    """The path that a name means, of which both separators are understood.

    Args:
        name: absolute, or relative to `base`.
        base: folder that relative names start from; None for the working folder.
    """
    path = Path(name) if base is None else base / name
    if "\\" in name and not is_there(path):  # a path that Windows wrote
        plain = name.replace("\\", "/")
        path = Path(plain) if base is None else base / plain
    return path


def is_there(path: Path) -> bool:
    """Whether something has this path; a name that no file can have is of none."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, for example
        return False


def _named(value: str, base: Path | None) -> EncodedImage:
    if not value.strip():
        return None
    if is_base64(value):
        return from_base64(value)
    address = _ADDRESS.match(value)
    scheme = address["scheme"].lower() if address else ""
    if scheme == "data":
        return from_base64(value.partition(",")[2])
    if scheme == "file":
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(value).path))
    if scheme in ("http", "https", "s3", "gs", "hf", "ftp"):
        raise BadImageError(
            SkipReason.MISSING_IMAGE,
            f"{value[:200]} is a remote address, which is not followed: download the images and "
            "give their paths",
        )
    return path_of(value, base)


def starts_like_an_image(path: Path) -> bool:
    """Whether a file, whatever its name, begins as one of the formats that are read does."""
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith(_STARTS) or start[4:12] == b"ftypavif" or start[8:12] == b"WEBP"


def format_of(content: bytes) -> str:
    """The name of an image file's format in lower case, such as `jpeg`.

    Raises:
        BadImageError: it is none that is read.
    """
    with _file(content) as file:
        return str(_open(file, MAX_PIXELS).format).lower()


def content_of(encoded: EncodedImage) -> bytes:
    """The whole file.

    Raises:
        BadImageError: there is none, or it is empty.
    """
    if isinstance(encoded, bytes) and encoded:
        return encoded
    with _file(encoded) as file:
        return file.read()


def ends_whole(content: bytes) -> bool:
    """Whether a file ends as its format says, to be asked before it is decoded.

    What was cut off does not; damage within a file shows in decoding alone. False, too, for formats
    that do not say their end (TIFF, AVIF, JPEG 2000).
    """
    if content.startswith(b"\xff\xd8"):
        return b"\xff\xd9" in content[-_TRAILER:]
    if content.startswith(b"\x89PNG"):
        return b"IEND" in content[-_TRAILER:]
    if content.startswith(b"RIFF"):
        return len(content) >= 8 + int.from_bytes(content[4:8], "little")
    if content.startswith(b"GIF8"):
        return content.rstrip(b"\0").endswith(b";")
    if content.startswith(b"BM"):
        return len(content) >= int.from_bytes(content[2:6], "little")
    return False


def decode(
    encoded: EncodedImage, *, max_pixels: int = MAX_PIXELS, at_least: int | None = None
) -> Image.Image:
    """The upright RGB image that training and evaluation see alike.

    Turned as its EXIF or TIFF orientation says; colours brought to sRGB where an embedded profile
    says what they are; transparency over white; 16 bits a channel cut to the upper 8, numbers in
    [0, 1] of floating-point files times 255; of several pages or frames the first.

    Args:
        encoded: of the image.
        max_pixels: see below.
        at_least: sides of this many pixels do, for a look that need not be sharp: a JPEG is then
            decoded at a half, a quarter or an eighth of its size, in a fraction of the time.

    Raises:
        BadImageError: there is no image, it is damaged, or it has more than `max_pixels`.
    """
    with _file(encoded) as file:
        image = _open(file, max_pixels)
        try:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            return _rgb(ImageOps.exif_transpose(image))
        except BadImageError:
            raise
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
        try:
            orientation = 1
            if image.format != "PNG" or _may_be_turned(file):
                orientation = image.getexif().get(_ORIENTATION, 1)
        except Exception as error:  # as in `decode`
            raise BadImageError(SkipReason.CORRUPT, f"{type(error).__name__}: {error}") from error
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose size may be turned already
            width, height = image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]
    turned = orientation in (5, 6, 7, 8)  # they exchange the axes
    return (width, height) if turned else (height, width)


def _may_be_turned(png: BinaryIO) -> bool:
    """Whether a PNG may say an orientation, which can lie behind its pixels: to ask Pillow decodes
    them. One that is cut off is asked, too."""
    place = png.tell()
    png.seek(0)
    content = png.read()
    png.seek(place)
    says = any(name in content for name in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp"))
    return says or not ends_whole(content)


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
        if isinstance(encoded, bytes):
            size = len(encoded)
        else:
            found = encoded.stat()
            size = found.st_size
            if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, for ever
                raise BadImageError(SkipReason.MISSING_IMAGE, f"{encoded} is no file")
        if size == 0:
            raise BadImageError(SkipReason.EMPTY_FILE, "0 bytes")
        return io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded.open("rb")
    except (OSError, ValueError) as error:  # a name with a NUL in it is a ValueError
        raise BadImageError(SkipReason.MISSING_IMAGE, str(error)) from error


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_of_numbers(image).convert("RGB")  # `convert` would clip at 255
    image = _in_srgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _grey_of_numbers(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits in 8 bits."""
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    if values.dtype.kind == "f":
        levels = values * 255 if np.nanmax(values, initial=0) <= 1 else values
    elif values.dtype.itemsize == 2 or values.max(initial=0) > 255:
        levels = values // 256
    else:
        levels = values
    if not np.isfinite(levels).all() or levels.min(initial=0) < 0 or levels.max(initial=0) > 255:
        raise BadImageError(
            SkipReason.CORRUPT,
            f"its numbers reach from {values.min():g} to {values.max():g}, a range that says no "
            "brightness: save it with 8 or 16 bits a channel",
        )
    grey = np.round(levels).astype(np.uint8)
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _in_srgb(image: Image.Image) -> Image.Image:
    """The image with the colours that its embedded profile describes; without one, as it is."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "CMYK"):
        return image
    try:
        convert = _conversion(profile, image.mode)
        return (convert and ImageCms.applyTransform(image, convert)) or image
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):  # a broken one says nothing
        return image


@functools.lru_cache(maxsize=16)
def _conversion(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the colours of a profile to sRGB; None where they are sRGB."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(opened).lower():
        return None
    return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")


def size_or_reason(image: EncodedImage, max_pixels: int) -> Size | str:
    """(height, width) of a decoded image, or why it cannot be used."""
    try:
        decoded = decode(image, max_pixels=max_pixels)
    except BadImageError as error:
        return f"{error.reason.value}: {error.detail}"
    return decoded.height, decoded.width


def size_in_words(size: Size | str) -> str:
    """What `size_or_reason` gave, for people."""
    return size if isinstance(size, str) else f"{size[0]} x {size[1]}"
