"""Samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.data.batches import ImageBatch
from diffalign.data.samples import Sample


def collate(samples: Sequence[Sample]) -> ImageBatch:
    """Stack samples of one image size; images become float32 in [-1, 1], pinned next to a GPU."""
    views = tuple(samples[0].images)
    return ImageBatch(
        sample_ids=tuple(sample.sample_id for sample in samples),
        prompts=tuple(sample.prompt for sample in samples),
        images={view: _images([s.images[view].pixels for s in samples]) for view in views},
        original_sizes={
            view: torch.tensor([s.images[view].original_size for s in samples]) for view in views
        },
        crop_corners={
            view: torch.tensor([s.images[view].corner for s in samples]) for view in views
        },
        timesteps=torch.tensor([sample.timestep for sample in samples], dtype=torch.float64),
        noise_seeds=tuple(sample.noise_seed for sample in samples),
        encoding_seeds={view: tuple(s.encoding_seeds[view] for s in samples) for view in views},
    )


def _images(pixels: list[Tensor]) -> Tensor:
    images = torch.stack(pixels).float().div_(127.5).sub_(1.0)
    return images.pin_memory() if torch.cuda.is_available() else images
