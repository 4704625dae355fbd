"""A model whose predictions are worked out on paper, as far as a sampler asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffalign.models.diffusion.noising import Epsilon
from diffalign.seeding import derive_seed

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
NOISING = Epsilon(
    schedule_length=1000, alphas_cumprod=torch.cumprod(1 - BETAS, dim=0), steps_offset=1
)
"""Stable Diffusion's: 20 steps leave from 951, 901, ..., 51, 1."""


def slope_of(prompt: str) -> float:
    """In [0, 1): how steeply the prediction follows the state."""
    return derive_seed(prompt) % 1000 / 1000


class LinearModel:
    """Predicts `slope * state + t / 1000` as the noise; an image is its latent, cut off."""

    noising = NOISING
    device = torch.device("cpu")
    image_size = (2, 2)

    def __init__(self) -> None:
        self.evaluations = 0
        self.told_sizes: set[tuple[int, int] | None] = set()

    def latent_shape_at(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return (3, *size)

    def guidance_conditioning(
        self, prompts: Sequence[str], *, guidance: float, size: tuple[int, int] | None = None
    ) -> Mapping[str, Any]:
        self.told_sizes.add(size)
        return {"slope": torch.tensor([slope_of(prompt) for prompt in prompts])}

    def guided(
        self, noisy: Tensor, time: Tensor, conditioning: Mapping[str, Any], *, guidance: float
    ) -> Tensor:
        self.evaluations += len(noisy)
        return conditioning["slope"][:, None, None, None] * noisy + time[:, None, None, None] / 1000

    def decode_images(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        return latents.clamp(-1, 1) if clamp else latents

    @contextmanager
    def sampling(self) -> Iterator[None]:
        with torch.no_grad():
            yield
