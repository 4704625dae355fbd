"""Gaussian noise on the levels of the image.

Source: MIA-DPO (Liu et al. 2024, arXiv:2410.17637), with a standard deviation of 49 on whole
images and of 225 on a cell of a grid. Its cast to bytes wraps levels; here they are clamped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from PIL import Image

from diffalign.data.responses.corruptions.base import AbstractCondition, Origin
from diffalign.ranges import AtLeast


@dataclass(frozen=True, kw_only=True)
class Noise(AbstractCondition):
    """Noise before the processor, every channel of every pixel on its own."""

    origin: ClassVar[Origin] = Origin.OWN

    sigma: Annotated[float, AtLeast(0)]
    """Standard deviation in levels of 0 to 255. No default: it depends on what should still be
    seen."""

    def image(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        levels = np.asarray(image, dtype=np.float32)
        noise = torch.randn(levels.shape, generator=generator).numpy()
        noisy = np.clip(np.rint(levels + self.sigma * noise), 0, 255)
        return Image.fromarray(noisy.astype(np.uint8))
