"""Samples to a batch: stacked by the worker as bytes, turned into numbers by the training process.

Bytes are a quarter of the memory that processes share, which is scarce in containers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.data.batches import ImageBatch
from diffalign.data.pairs.samples import Sample


def stack(samples: Sequence[Sample]) -> ImageBatch:
    """A batch of samples of one image size, whose images are still uint8 [B, 3, H, W]."""
    views = tuple(samples[0].images)
    return ImageBatch(
        sample_ids=tuple(sample.sample_id for sample in samples),
        prompts=tuple(sample.prompt for sample in samples),
        captions=tuple(sample.caption for sample in samples),
        images={view: torch.stack([s.images[view].pixels for s in samples]) for view in views},
        original_sizes={
            view: torch.tensor([s.images[view].original_size for s in samples]) for view in views
        },
        crop_corners={
            view: torch.tensor([s.images[view].corner for s in samples]) for view in views
        },
        timesteps=torch.tensor([sample.timestep for sample in samples], dtype=torch.float64),
        noise_seeds=tuple(sample.noise_seed for sample in samples),
        encoding_seeds={view: tuple(s.encoding_seeds[view] for s in samples) for view in views},
        preference=torch.tensor([sample.preference for sample in samples]),
        importance=torch.tensor([sample.importance for sample in samples]),
    )


def with_unit_range(batch: ImageBatch) -> ImageBatch:
    """The stacked batch with images as float32 in [-1, 1]."""
    return dataclasses.replace(
        batch, images={view: unit_range(pixels) for view, pixels in batch.images.items()}
    )


def unit_range(pixels: Tensor) -> Tensor:
    """Levels from 0 to 255 as float32 in [-1, 1]."""
    return torch.sub(pixels, 127.5).div_(127.5)
