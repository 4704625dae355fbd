"""A small part of the image, enlarged to its size: most of what the response describes is gone.

Source: mDPO (Wang et al. 2024, arXiv:2406.11839), whose ablation prefers crops of less than 20 % to
larger ones, to other images and to colour changes. There the crop is cut from the tensor that the
processor made, and sampled anew for the reference; here from the image, once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from PIL import Image

from diffalign.data.responses.corruptions.base import AbstractCondition, Origin
from diffalign.ranges import AtLeast

_ATTEMPTS = 10
"""Samples before the fallback, as in torchvision's RandomResizedCrop."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Crop(AbstractCondition):
    """A random crop, resized back."""

    origin: ClassVar[Origin] = Origin.OWN

    smallest: float = 0.01
    """Smallest part of the area that is kept, in (0, 1]."""
    largest: float = 0.2
    """Largest part of the area that is kept, in (0, 1]."""
    stretch: Annotated[float, AtLeast(1)] = 4 / 3
    """Width over height of the crop is log-uniform from 1 / stretch to stretch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.smallest <= self.largest <= 1:
            raise ValueError(
                f"smallest and largest are parts of the area, 0 < smallest <= largest <= 1; "
                f"got {self.smallest} and {self.largest}"
            )

    def image(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        box = self.box(image.width, image.height, generator)
        return image.resize(image.size, Image.Resampling.BILINEAR, box=box)

    def box(self, width: int, height: int, generator: torch.Generator) -> Box:
        """(left, top, right, bottom) in pixels of one random crop."""
        for _ in range(_ATTEMPTS):
            part, shape, left, top = torch.rand(4, generator=generator).tolist()
            area = (self.smallest + part * (self.largest - self.smallest)) * width * height
            aspect = self.stretch ** (2 * shape - 1)
            w = max(1, round(math.sqrt(area * aspect)))
            h = max(1, round(math.sqrt(area / aspect)))
            if w <= width and h <= height:
                x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
                return x, y, x + w, y + h
        return self._middle(width, height)

    def _middle(self, width: int, height: int) -> Box:
        """For an image so narrow that no crop of the area fits: as much as its shape lets."""
        w = min(width, max(1, round(height * self.stretch)))
        h = min(height, max(1, round(width * self.stretch)))
        x, y = (width - w) // 2, (height - h) // 2
        return x, y, x + w, y + h
