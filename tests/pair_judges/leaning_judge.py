"""A pair judge for tests: the brighter image, and a lean to the one that is shown first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.pair_judges.base import AbstractPairJudge


@dataclass(frozen=True, kw_only=True)
class LeaningJudge(AbstractPairJudge):
    """Sigmoid of `slope` times the difference of brightness, and `lean`."""

    slope: float = 1.0
    lean: float = 0.0

    @property
    def fingerprint(self) -> str:
        return f"leaning-{self.slope}-{self.lean}"

    def prefers(
        self, first: Sequence[Image.Image], second: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Tensor:
        if "raise" in prompts:
            raise ValueError("this prompt cannot be judged")
        light = [[float(np.mean(image)) / 255 for image in side] for side in (first, second)]
        gap = torch.tensor(light[0]) - torch.tensor(light[1])
        return torch.sigmoid(self.slope * gap + self.lean)
