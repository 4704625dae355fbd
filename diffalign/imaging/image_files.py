"""Images as files, as the tensors that scorers take, and as data inside a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data.decoding import BadImageError, decode

PIXEL_ART = 128
"""Images up to this size are embedded as they are and enlarged without smoothing."""
_EMBEDDED_PIXELS = 448
"""Longer side of embedded images; larger ones are reduced and stored as JPEG."""
_JPEG_QUALITY = 88


def read_image(path: Path) -> Image.Image:
    """An image file as RGB, decoded as for training.

    Raises:
        OSError: the file is gone, damaged, or a decompression bomb.
    """
    try:
        return decode(path)
    except BadImageError as error:
        raise OSError(f"{error.reason.value}: {error.detail}") from error


def pixels_of(image: Image.Image) -> Tensor:
    """An image as scorers take it: shape [3, H, W], float32 in [-1, 1]."""
    levels = np.array(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(levels).permute(2, 0, 1) / 127.5 - 1


def to_images(images: Tensor) -> list[Image.Image]:
    """RGB images of [n, 3, H, W] in [-1, 1], rounded as when they are written to files."""
    levels = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    arrays = levels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def encode_png(image: Tensor) -> bytes:
    """An image of shape [3, H, W] in [-1, 1] as the bytes of a PNG file."""
    buffer = io.BytesIO()
    to_images(image[None])[0].save(buffer, format="png")
    return buffer.getvalue()


def data_uri(
    image: Image.Image,
    *,
    side: int = _EMBEDDED_PIXELS,
    form: Literal["jpeg", "webp"] = "jpeg",
    quality: int = _JPEG_QUALITY,
) -> str:
    """An image as a data URI: small ones exactly, as PNG, large ones reduced.

    Args:
        image: any size and mode; transparency is lost.
        side: the longer side of what is embedded, in pixels, at most.
        form: of those that are not small; WebP takes a third less than JPEG.
        quality: of JPEG or WebP, 0 to 100.
    """
    buffer = io.BytesIO()
    image = image.convert("RGB")
    if max(image.size) <= PIXEL_ART:
        image.save(buffer, format="png", optimize=True)
        return _uri("png", buffer)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(buffer, format=form, quality=quality)
    return _uri(form, buffer)


def whole_uri(image: Image.Image) -> str:
    """An image as it is, every pixel of it, as the `data:` address of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="png", compress_level=1)
    return _uri("png", buffer)


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
