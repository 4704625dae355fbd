"""Square blocks hidden at random.

Source: OPA-DPO (Yang et al. 2025, arXiv:2501.09695), its `blockwise` option: blocks of 14 by 14,
the patches of CLIP's ViT-L, set to the mean of the processed image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from diffalign.data.responses.corruptions.base import AbstractCondition, Origin
from diffalign.data.responses.corruptions.masking import check_fraction, set_to_mean
from diffalign.ranges import AtLeast


@dataclass(frozen=True, kw_only=True)
class BlockMask(AbstractCondition):
    """Some of the blocks set to the mean of the image."""

    origin: ClassVar[Origin] = Origin.OWN

    fraction: float = 0.3
    """Of the blocks, 0 to 1."""
    block: Annotated[int, AtLeast(1)] = 14
    """Side of a block, pixels of the processed image; they do not reach over borders of tiles."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.fraction)

    def pixels(self, tiles: Tensor, generator: torch.Generator) -> Tensor:
        return set_to_mean(tiles, fraction=self.fraction, block=self.block, generator=generator)
