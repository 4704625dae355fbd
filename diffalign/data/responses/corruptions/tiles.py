"""Outputs of an image processor, as one tensor of tiles an image, and back.

Three layouts are in use: an image in one piece (LLaVA-1.5), an image in a whole and crops of it
(LLaVA-NeXT), and the flattened patches of all images in one list (Qwen2-VL), each of them as
often as a patch spans frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ModelError

ImageInputs = Mapping[str, Tensor]
"""Outputs of an image processor by name."""


def to_tiles(image_inputs: ImageInputs, image_processor: Any) -> list[Tensor]:
    """The tiles of each image, [tiles, channels, height, width].

    Args:
        images: of one or more images; not empty.
        image_processor: which made them.

    Raises:
        ModelError: the layout is none of the three.
    """
    values = image_inputs["pixel_values"]
    if values.ndim == 4:
        return list(values.unsqueeze(1))
    if values.ndim == 5:
        return list(values)
    if values.ndim == 2 and "image_grid_thw" in image_inputs:
        frames, side = image_processor.temporal_patch_size, image_processor.patch_size
        patches = values.unflatten(1, (-1, frames, side, side))[:, :, 0]
        return list(patches.split(image_inputs["image_grid_thw"].prod(dim=1).tolist()))
    raise ModelError(
        f"{type(image_processor).__name__} gives pixel_values of shape {list(values.shape)}, which "
        f"conditions on pixels do not know. Use one that changes the image before the processor: "
        f"crop, noise, replaced or random"
    )


def with_tiles(
    image_inputs: ImageInputs, tiles: Sequence[Tensor], image_processor: Any
) -> ImageInputs:
    """The same outputs with other pixel values: the inverse of `to_tiles`."""
    values = image_inputs["pixel_values"]
    if values.ndim == 4:
        joined = torch.cat(list(tiles))
    elif values.ndim == 5:
        joined = torch.stack(list(tiles))
    else:
        frames = image_processor.temporal_patch_size
        joined = torch.cat(list(tiles)).unsqueeze(2).expand(-1, -1, frames, -1, -1).flatten(1)
    return {**image_inputs, "pixel_values": joined}
