"""A step-aware scorer for tests: brightness, which counts the more the less noise there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.scorers.base import AbstractScorer


@dataclass(frozen=True, kw_only=True)
class NoisyBrightness(AbstractScorer):
    """Mean of all visible values times `scale`, less at high timesteps; prompts may spoil it."""

    takes_time: ClassVar[bool] = True

    scale: float = 1000.0
    """Tiny random models generate images of nearly the same brightness."""

    @property
    def fingerprint(self) -> str:
        return f"noisy-brightness-{self.scale}"

    def score(self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        assert t is not None, "it takes the time"
        scores = (
            self.scale * images.clamp(-1, 1).mean(dim=(1, 2, 3)) * (1 - t.to(images.device) / 1000)
        )
        spoilt = torch.tensor(["nan" in prompt for prompt in prompts])
        return scores.masked_fill(spoilt.to(images.device), torch.nan)
