"""A scorer for tests: how bright an image is; prompts may ask it to misbehave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.scorers.base import AbstractScorer


@dataclass(frozen=True, kw_only=True)
class Brightness(AbstractScorer):
    """Mean of all values, 0 for black and 1 for white."""

    scale: float = 1.0
    """Multiplies the score."""

    @property
    def fingerprint(self) -> str:
        return f"brightness-{self.scale}"

    def score(self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        if "raise" in prompts:
            raise ValueError("this prompt cannot be scored")
        values = self.scale * (images.mean(dim=(1, 2, 3)) + 1) / 2
        undefined = torch.tensor([prompt == "nan" for prompt in prompts])
        return values.masked_fill(undefined, torch.nan)
