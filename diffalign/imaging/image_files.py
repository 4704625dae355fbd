"""Read image files as for training, and as scorers take them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data.decoding import BadImageError, decode


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
