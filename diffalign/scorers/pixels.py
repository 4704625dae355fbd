"""What PIL and torchvision do to an image before a network sees it, as operations with a gradient.

Resizing with PIL happens in 8 bits, across and down, with a rounding after each. So it does here
with float tensors, and rounding passes gradients on (straight-through: Bengio et al. 2013,
arXiv:1308.3432). The values are those of PIL but for a level in a few pixels.
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

Filter = Literal["bicubic", "bilinear"]


def levels_of(image: Image.Image) -> Tensor:
    """An RGB image as levels, shape [3, H, W], float32 from 0 to 255."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)


def rounded_levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as the levels of their 8-bit files, with a gradient where they lie inside.

    Args:
        images: shape [n, 3, H, W], any float type; what lies outside is cut off.

    Returns:
        The same shape, float32 from 0 to 255, whole numbers.
    """
    levels = (images.float().clamp(-1, 1) + 1) * 127.5
    return _passing(levels, levels.round())


def resized(levels: Tensor, size: tuple[int, int], *, filter: Filter = "bicubic") -> Tensor:
    """Images of another size, as PIL resizes them.

    Args:
        levels: shape [n, 3, H, W], from 0 to 255.
        size: height and width, pixels.
        filter: of PIL's resampling; it widens where an image shrinks.

    Returns:
        Shape [n, 3, *size], whole numbers from 0 to 255 where the size changed.
    """
    height, width = levels.shape[-2:]
    return _in_two_steps(levels, size, filter, _goes_across_first(height, width, size, filter))


def _in_two_steps(
    levels: Tensor, size: tuple[int, int], filter: Filter, across_first: bool
) -> Tensor:
    height, width = levels.shape[-2:]
    between = (height, size[1]) if across_first else (size[0], width)
    for step in (between, size):
        if tuple(levels.shape[-2:]) != step:
            smooth = interpolate(
                levels, size=step, mode=filter, align_corners=False, antialias=True
            ).clamp(0, 255)
            levels = _passing(smooth, (smooth + 0.5).floor())
    return levels


@functools.lru_cache(maxsize=256)
def _goes_across_first(height: int, width: int, size: tuple[int, int], filter: Filter) -> bool:
    """Whether PIL resizes images of a shape across before it resizes them down.

    Pillow 13 chooses by the shapes, and others need not: the installed one is asked, with noise.
    """
    if height == size[0] or width == size[1]:
        return True  # one step alone
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resampling = getattr(Image.Resampling, filter.upper())
    theirs = levels_of(Image.fromarray(noise).resize((size[1], size[0]), resampling))
    levels = levels_of(Image.fromarray(noise))[None]
    apart = [
        (_in_two_steps(levels, size, filter, first)[0] != theirs).sum() for first in (True, False)
    ]
    return bool(apart[0] <= apart[1])


def short_side_to(levels: Tensor, size: int, *, filter: Filter = "bicubic") -> Tensor:
    """Images whose shorter side is `size`, of the same shape but for what is cut off of a pixel."""
    height, width = levels.shape[-2:]
    longer = int(size * max(height, width) / min(height, width))
    target = (longer, size) if width <= height else (size, longer)
    return resized(levels, target, filter=filter)


def square(image: Image.Image, size: int) -> Image.Image:
    """The middle of an image whose shorter side becomes `size`: torchvision's Resize, bicubic with
    PIL, and CenterCrop, which is the transform of OpenAI's CLIP."""
    shrunk = resize(image, size, InterpolationMode.BICUBIC)
    cut: Image.Image = center_crop(shrunk, [size, size])
    return cut


def square_levels(levels: Tensor, size: int) -> Tensor:
    """The same of levels, [n, 3, H, W] -> [n, 3, size, size], with a gradient."""
    return middle(short_side_to(levels, size), size)


def middle(levels: Tensor, size: int, *, halves: Literal["even", "down"] = "even") -> Tensor:
    """The middle of images that are no smaller.

    Args:
        levels: shape [n, 3, H, W].
        size: side of what is kept, pixels.
        halves: where a margin is odd, half of it becomes the nearest even number (torchvision), or
            is rounded down (transformers).
    """
    margins = [length - size for length in levels.shape[-2:]]
    top, left = (round(m / 2) if halves == "even" else m // 2 for m in margins)
    return levels[..., top : top + size, left : left + size]


def _passing(smooth: Tensor, whole: Tensor) -> Tensor:
    """The values of `whole` with the gradient of `smooth`."""
    return smooth + (whole - smooth).detach()
