"""A reward model of one's own as a pair judge: the only reading of a head that compares.

`head.kind: general` (GPM) says of two images which is preferred and scores none by itself, since
its preferences may run in circles; of a model whose head scores images the probability is the
sigmoid of the difference of two scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from diffalign.models.preference.rewards import OwnReward
from diffalign.pair_judges.base import AbstractPairJudge


@dataclass(frozen=True, kw_only=True)
class TrainedPairJudge(OwnReward, AbstractPairJudge):
    """What a reward model of one's own prefers."""

    @cached_property
    def fingerprint(self) -> str:
        return f"trained_pair-{self._identity}"

    def prefers(
        self, first: Sequence[Image.Image], second: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Tensor:
        found, size = [], max(1, self.images_per_batch // 2)
        for start in range(0, len(prompts), size):
            some = slice(start, start + size)
            sides = [self._outputs(images[some], prompts[some]) for images in (first, second)]
            one, other = self._model.head.sides(*sides)
            found.append(torch.sigmoid(one - other))
        return torch.cat(found)
