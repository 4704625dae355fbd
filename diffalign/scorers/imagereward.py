"""ImageReward: what a BLIP that was trained on rankings of experts thinks of an image and a prompt.

Rewards have mean 0 and variance 1 over the authors' data and compare between prompts. The prompt is
cut at 35 tokens, the image to its middle square, as in the authors' code.

Source: Xu et al. 2023, arXiv:2304.05977; THUDM/ImageReward, ImageReward.py.
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
from diffalign.models.preference.blip_reward import (
    RENAMED,
    UNUSED,
    BLIPReward,
    blank_reward,
)
from diffalign.models.preference.clip_loading import (
    digest_of,
    fill,
    find_weights,
    pixel_values,
    read_state,
    read_tokenizer,
    renamed,
)
from diffalign.scorers.images import AbstractTowerScorer, Images, Prepare
from diffalign.scorers.pixels import levels_of, square, square_levels

TOKENS = 35
"""Length to which prompts are cut and padded."""
ADDED = ("[DEC]", "[ENC]")
"""Tokens that BLIP adds to BERT's."""


@dataclass(frozen=True, kw_only=True)
class ImageReward(AbstractTowerScorer):
    """Standardised reward of an image for its prompt, some -2 to 2."""

    path: str = field(metadata=MUST_STAY)
    """A `.safetensors` file of the released weights, or a folder or hub id with model.safetensors
    and, for another architecture, the config.json of a BLIP. The authors release a pickle:
    `diffalign convert THUDM/ImageReward/ImageReward.pt output=imagereward.safetensors`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its default branch."""
    tokenizer: str = "google-bert/bert-base-uncased"
    """Folder or hub id of BERT's tokenizer."""

    @cached_property
    def fingerprint(self) -> str:
        files = [self._weights, *([self._config] if self._config else [])]
        parts = [digest_of(*files), self.tokenizer, *self.in_half_precision]
        return "-".join(["imagereward", *parts])

    def prepare(self, image: Image.Image) -> Tensor:
        return pixel_values(levels_of(square(image, self._network.image_size)) / 127.5 - 1)

    def prepare_levels(self, levels: Tensor) -> Tensor:
        return pixel_values(square_levels(levels, self._network.image_size) / 127.5 - 1)

    def score_prepared(self, images: Images, prompts: Sequence[str], prepare: Prepare) -> Tensor:
        text = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        like = self._network.vision.embeddings.class_embedding
        parts = []
        for part in torch.arange(len(prompts)).split(self.images_per_batch):
            some = slice(int(part[0]), int(part[-1]) + 1)
            parts.append(
                self._network(
                    prepare(images[some]).to(like.device, like.dtype),
                    text.input_ids[some].to(like.device),
                    text.attention_mask[some].to(like.device),
                )
            )
        return torch.cat(parts)

    def to(self, device: torch.device | str) -> ImageReward:
        self._network.to(device)
        return self

    @cached_property
    def _weights(self) -> Path:
        return find_weights(self.path, revision=self.revision)

    @property
    def _config(self) -> Path | None:
        """Of a folder that has one."""
        config = self._weights.parent / "config.json"
        return config if config.is_file() and not self.path.endswith(".safetensors") else None

    @cached_property
    def _network(self) -> BLIPReward:
        with torch.inference_mode(False):  # else no gradient could ever pass
            network = blank_reward(self._config)
            state = renamed(read_state(self._weights), RENAMED, unused=UNUSED)
            fill(network, state, source=self.path)
            return network.requires_grad_(False).eval().in_precision(DTYPES[self.dtype])

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = read_tokenizer(self.tokenizer, field="tokenizer", kind="BERT")
        tokenizer.add_tokens(list(ADDED), special_tokens=True)
        return tokenizer
