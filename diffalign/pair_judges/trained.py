"""A reward model of one's own as a pair judge: the only reading of a head that compares.

`head.kind: general` (GPM) says of two images which is preferred and scores none by itself, since
its preferences may run in circles; of a model whose head scores images the probability is the
sigmoid of the difference of two scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image
from torch import Tensor

from diffalign.config import MUST_STAY
from diffalign.models.devices import send
from diffalign.models.preference.rewards import (
    RewardModel,
    check_user,
    content_of,
    exported,
    open_reward,
)
from diffalign.pair_judges.base import AbstractPairJudge
from diffalign.ranges import AtLeast


@dataclass(frozen=True, kw_only=True)
class TrainedPairJudge(AbstractPairJudge):
    """What a reward model of one's own prefers."""

    path: str = field(metadata=MUST_STAY)
    """Folder of a run with `model.kind: clip_reward` or `vlm_reward`, or its `final`."""
    user: str | None = None
    """Whose taste counts, where the model tells several apart (`head.kind: pal`)."""
    images_per_batch: Annotated[int, AtLeast(1)] = 32
    """Images in one pass of the network, which bounds its memory."""

    @cached_property
    def fingerprint(self) -> str:
        whose = "" if self.user is None else f"-{self.user}"
        return f"trained_pair-{content_of(self._folder)}{whose}"

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

    def _outputs(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        users = None if self.user is None else [self.user] * len(images)
        rows = None if users is None else self._model.head.rows_of(users)
        moved = None if rows is None else send(rows, self._model.device)
        return self._model.outputs(self._model.read(images, prompts), moved)

    def to(self, device: torch.device | str) -> TrainedPairJudge:
        self._model.to(device)
        return self

    @cached_property
    def _folder(self) -> Path:
        return exported(Path(self.path).expanduser())

    @cached_property
    def _model(self) -> RewardModel:
        model = open_reward(self._folder)
        check_user(self.user, model.head, self.path)
        return model
