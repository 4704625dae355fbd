"""The image under the noise of a forward diffusion: sqrt(a) v + sqrt(1 - a) e.

Source: POVID (Zhou et al. 2024, arXiv:2402.11411) and CHiP (arXiv:2501.16629), both at step 500 of
1000. Where a processor shows a patch twice, as Qwen2-VL's does for its frames, both get the same
noise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from diffalign.data.responses.corruptions.base import AbstractCondition, Origin
from diffalign.ranges import Between

STEPS = 1000


@functools.cache
def kept_signal() -> Tensor:
    """Product of 1 - beta up to each step, float64 [1000].

    beta_k = sigmoid(linspace(-6, 6)) * (0.005 - 1e-5) + 1e-5, a quarter of the usual noise.
    """
    ramp = torch.linspace(-6, 6, STEPS, dtype=torch.float64)
    betas = torch.sigmoid(ramp) * (0.005 - 1e-5) + 1e-5
    return torch.cumprod(1 - betas, dim=0)


@dataclass(frozen=True, kw_only=True)
class Diffuse(AbstractCondition):
    """Noise on the normalised pixel values."""

    origin: ClassVar[Origin] = Origin.OWN

    step: Annotated[int, Between(0, STEPS - 1)] = 500
    """Step of the diffusion, 0 (clean) to 999."""

    def pixels(self, tiles: Tensor, generator: torch.Generator) -> Tensor:
        kept = float(kept_signal()[self.step])
        noise = torch.randn(tiles.shape, generator=generator)
        return kept**0.5 * tiles + (1 - kept) ** 0.5 * noise
