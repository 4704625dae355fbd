"""An image of the mean colour: all normalised pixel values zero.

Source: V-DPO (Xie et al. 2024, arXiv:2411.02712), as an image that says nothing; `black` in CHiP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.data.responses.corruptions.base import AbstractCondition, Origin


@dataclass(frozen=True, kw_only=True)
class Zero(AbstractCondition):
    """Nothing to be seen."""

    origin: ClassVar[Origin] = Origin.OWN

    def pixels(self, tiles: Tensor, generator: torch.Generator) -> Tensor:
        return torch.zeros_like(tiles)
