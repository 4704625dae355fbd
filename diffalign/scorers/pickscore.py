"""PickScore: which of two images people preferred for a prompt, as a CLIP learnt it.

A difference of scores is a log-odds: two images that differ by d are preferred in a ratio of
exp(d). Scores of one prompt compare; those of different prompts hardly do.

Source: Kirstain et al. 2023, arXiv:2305.01569, and the example in the README of
yuvalkirstain/PickScore.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.config import MUST_STAY
from diffalign.models.devices import DTYPES
from diffalign.models.preference.clip_loading import (
    blank_clip,
    digest_of,
    fill,
    find_weights,
    image_features,
    pixel_values,
    read_state,
    read_tokenizer,
    text_features,
    tokenize,
    tower_input,
)
from diffalign.scorers.images import AbstractCosineScorer
from diffalign.scorers.pixels import middle, short_side_to


@dataclass(frozen=True, kw_only=True)
class PickScore(AbstractCosineScorer):
    """exp(logit_scale) times the cosine between image and prompt; some 20 in practice."""

    path: str = field(default="yuvalkirstain/PickScore_v1", metadata=MUST_STAY)
    """Folder or hub id of a CLIP in the layout of transformers, or its file of weights."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its default branch."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, where it does not lie next to the weights."""
    allow_pickle: bool = False
    """Read a pickled file of weights, as tensors alone."""

    @cached_property
    def fingerprint(self) -> str:
        digest = digest_of(self._weights, self._weights.parent / "config.json")
        parts = [digest, *([self.tokenizer] if self.tokenizer else []), *self.in_half_precision]
        return "-".join(["pickscore", *parts])

    def prepare(self, image: Image.Image) -> Tensor:
        return tower_input(image, self._size)

    def prepare_levels(self, levels: Tensor) -> Tensor:
        cut = middle(short_side_to(levels, self._size), self._size, halves="down")
        return pixel_values(cut / 127.5 - 1)

    @property
    def scale(self) -> Tensor:
        value: Tensor = self._clip.logit_scale.float().exp()
        return value

    def to(self, device: torch.device | str) -> PickScore:
        self._clip.to(device)
        return self

    @property
    def _size(self) -> int:
        return int(self._clip.config.vision_config.image_size)

    def embed_images(self, pixels: Tensor) -> Tensor:
        return image_features(self._clip, pixels.to(self._clip.device, self._clip.dtype))

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        length = self._clip.config.text_config.max_position_embeddings
        tokens = tokenize(self._tokenizer, prompts, length=length)
        return text_features(self._clip, tokens.to(self._clip.device))

    @cached_property
    def _weights(self) -> Path:
        return find_weights(self.path, revision=self.revision, allow_pickle=self.allow_pickle)

    @cached_property
    def _clip(self) -> Any:
        with torch.inference_mode(False):  # else no gradient could ever pass
            clip = blank_clip(str(self._weights.parent), field="path")
            fill(clip, read_state(self._weights), source=self.path)
            return clip.requires_grad_(False).eval().to(DTYPES[self.dtype])

    @cached_property
    def _tokenizer(self) -> Any:
        if self.tokenizer is not None:
            return read_tokenizer(self.tokenizer, field="tokenizer")
        return read_tokenizer(str(self._weights.parent), field="path")
