"""Single pixels hidden at random.

Source: OPA-DPO (Yang et al. 2025, arXiv:2501.09695), where 30 % of the positions of the processed
image are set to its mean, one number for all channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.data.responses.corruptions.base import AbstractCondition, Origin
from diffalign.data.responses.corruptions.masking import check_fraction, set_to_mean


@dataclass(frozen=True, kw_only=True)
class PixelMask(AbstractCondition):
    """Some of the positions set to the mean of the image."""

    origin: ClassVar[Origin] = Origin.OWN

    fraction: float = 0.3
    """Of the positions, 0 to 1."""

    def __post_init__(self) -> None:
        check_fraction(self.fraction)

    def pixels(self, tiles: Tensor, generator: torch.Generator) -> Tensor:
        return set_to_mean(tiles, fraction=self.fraction, block=1, generator=generator)
