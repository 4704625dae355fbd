"""Parts of an image replaced by its mean: what pixel and block masks share."""

from __future__ import annotations

import torch
from torch import Tensor


def set_to_mean(
    tiles: Tensor, *, fraction: float, block: int, generator: torch.Generator
) -> Tensor:
    """Set random blocks to the mean over all channels and positions.

    Args:
        tiles: one image, [tiles, channels, height, width].
        fraction: of the blocks, rounded down.
        block: side in pixels; blocks at the right and lower border of a tile may be smaller.
        generator: on the CPU.

    Returns:
        A new tensor of the same shape.
    """
    count, _, height, width = tiles.shape
    rows, columns = -(-height // block), -(-width // block)
    blocks = count * rows * columns
    hidden = torch.zeros(blocks, dtype=torch.bool)
    hidden[torch.randperm(blocks, generator=generator)[: int(blocks * fraction)]] = True
    spread = hidden.view(count, 1, rows, columns)
    spread = spread.repeat_interleave(block, dim=2).repeat_interleave(block, dim=3)
    return torch.where(spread[:, :, :height, :width], tiles.mean(), tiles)


def check_fraction(fraction: float) -> None:
    """Raise ValueError unless it is a part of a whole."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be from 0 to 1, got {fraction}")
