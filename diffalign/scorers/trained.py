"""Score images by a reward model that `diffalign train` made."""

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
from diffalign.errors import ModelError
from diffalign.models.devices import send
from diffalign.models.preference.rewards import (
    RewardModel,
    check_user,
    content_of,
    exported,
    open_reward,
)
from diffalign.ranges import AtLeast
from diffalign.scorers.images import AbstractImageScorer


@dataclass(frozen=True, kw_only=True)
class Trained(AbstractImageScorer):
    """Scores of one's own reward model; a difference of two is a log-odds."""

    path: str = field(metadata=MUST_STAY)
    """Folder of a run with `model.kind: clip_reward` or `vlm_reward`, or its `final`."""
    user: str | None = None
    """Whose taste counts, where the model tells several apart (`head.kind: pal`)."""
    images_per_batch: Annotated[int, AtLeast(1)] = 32
    """Images in one pass of the network, which bounds its memory."""

    @cached_property
    def fingerprint(self) -> str:
        whose = "" if self.user is None else f"-{self.user}"
        return f"trained-{content_of(self._folder)}{whose}"

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        found, size = [], self.images_per_batch
        for start in range(0, len(images), size):
            some = slice(start, start + size)
            inputs = self._model.read(images[some], prompts[some])
            users = None if self.user is None else [self.user] * len(images[some])
            rows = None if users is None else self._model.head.rows_of(users)
            moved = None if rows is None else send(rows, self._model.device)
            found.append(self._model.outputs(inputs, moved))
        return torch.cat(found)

    def to(self, device: torch.device | str) -> Trained:
        self._model.to(device)
        return self

    @cached_property
    def _folder(self) -> Path:
        return exported(Path(self.path).expanduser())

    @cached_property
    def _model(self) -> RewardModel:
        model = open_reward(self._folder)
        if model.head.compares:
            raise ModelError(
                f"{self.path} compares two images, and gives none a score of its own "
                f"({model.head.describe()}): take scorer.kind=pairwise scorer.judge.kind=trained "
                f"scorer.judge.path={self.path}, or train head.kind linear to score images"
            )
        check_user(self.user, model.head, self.path)
        return model
