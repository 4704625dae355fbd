"""Score images by a reward model that `diffalign train` made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import ModelError
from diffalign.models.preference.heads.base import AbstractHead
from diffalign.models.preference.rewards import OwnReward
from diffalign.scorers.images import AbstractImageScorer


@dataclass(frozen=True, kw_only=True)
class Trained(OwnReward, AbstractImageScorer):
    """Scores of one's own reward model; a difference of two is a log-odds."""

    @cached_property
    def fingerprint(self) -> str:
        return f"trained-{self._identity}"

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        found, size = [], self.images_per_batch
        for start in range(0, len(images), size):
            some = slice(start, start + size)
            found.append(self._outputs(images[some], prompts[some]))
        return torch.cat(found)

    def _check_head(self, head: AbstractHead) -> None:
        if head.compares:
            raise ModelError(
                f"{self.path} compares two images, and gives none a score of its own "
                f"({head.describe()}): take scorer.kind=pairwise scorer.judge.kind=trained "
                f"scorer.judge.path={self.path}, or train head.kind linear to score images"
            )
