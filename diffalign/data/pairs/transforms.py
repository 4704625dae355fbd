"""From images of any shape to one target size, and where the crop came to lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data.decoding import Size
from diffalign.seeding import unit_interval

CENTER = -1
"""Number of the place in the middle."""


def numbered_place(sample_id: str, number: int, *, of: int | None) -> tuple[float, float] | None:
    """One of the few places that a pair may be cut at, spread over what there is to choose from;
    the same for every run.

    A covering image is larger than the target along one side alone, so that a diagonal is spread
    evenly over it.

    Args:
        sample_id: of the pair.
        number: from 0 to `of` - 1, or CENTER.
        of: how many places there are.
    """
    if number == CENTER or of is None:
        return None
    top, left = (
        (number + unit_interval(sample_id, "place", number, axis)) / of for axis in ("top", "left")
    )
    return top, left


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What is done to both sides of a pair, in fractions, so that it fits images of any size."""

    target: Size
    """Size of the result."""
    place: tuple[float, float] | None = None
    """Where the crop lies between the top left (0, 0) and the bottom right (1, 1) of what there is
    to choose from; None is the middle."""
    mirrored: bool = False
    """Whether left and right are exchanged."""
    number: int = CENTER
    """Of the place, where there are few to choose from."""


@dataclass(frozen=True, kw_only=True)
class CutImage:
    """An image cut to size."""

    pixels: Tensor
    """Uint8 [3, H, W]; or, of an image that was encoded in advance, its posterior."""
    original_size: Size
    """Before the resize."""
    corner: tuple[int, int]
    """(top, left) of the crop in the resized, and if so mirrored, image."""


def cut(image: Image.Image, how: Cut) -> CutImage:
    """Resize until the target is covered, mirror, and crop.

    The corner of a mirrored image is measured in the mirrored image, which is the one the network
    sees: left' = width - crop width - left. The SDXL script of diffusers (examples/text_to_image/
    train_text_to_image_sdxl.py) takes crop width - left, which is negative or beyond the image as
    soon as the image is much wider than the crop; this departs from it.
    """
    height, width = how.target
    resized = _covering(image, how.target)
    top, left = (
        _offset(slack, place)
        for slack, place in zip(
            (resized.height - height, resized.width - width),
            how.place or (None, None),
            strict=True,
        )
    )
    cropped = resized.crop((left, top, left + width, top + height))
    if how.mirrored:
        cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left = resized.width - width - left
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).contiguous()
    return CutImage(pixels=pixels, original_size=(image.height, image.width), corner=(top, left))


def _covering(image: Image.Image, target: Size) -> Image.Image:
    """The image at the smallest size that holds the target; bilinear, antialiased."""
    height, width = target
    if height * image.width >= width * image.height:
        width = height * image.width // image.height
    else:
        height = width * image.height // image.width
    if (height, width) == (image.height, image.width):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _offset(slack: int, place: float | None) -> int:
    return round(slack / 2) if place is None else min(slack, int(place * (slack + 1)))
