"""A scorer that takes its time, so that a test can end a run while it scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diffalign.scorers.base import AbstractScorer


@dataclass(frozen=True, kw_only=True)
class SlowBrightness(AbstractScorer):
    """Mean of all values."""

    seconds: float = 0.1
    """For each call."""

    @property
    def fingerprint(self) -> str:
        return "slow-brightness"

    def score(self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        time.sleep(self.seconds)
        return images.mean(dim=(1, 2, 3))
