"""LAION's aesthetic predictors: how much people like an image, whatever its prompt.

Heads on the embedding of CLIP's ViT-L/14, of length 1, trained on ratings of 1 to 10. Names of the
weights tell which of the three released forms a head has: one linear layer (version 1,
sa_0_4_vit_l_14_linear), or five layers (version 2) without activations between them
(sac+logos+ava1-l14-linearMSE, the one of most papers) or with ReLU (ava+logos-l14-reluMSE).

Source: christophschuhmann/improved-aesthetic-predictor, simple_inference.py, and
LAION-AI/aesthetic-predictor; images as OpenAI's CLIP prepares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffalign.config import MUST_STAY
from diffalign.models.devices import DTYPES
from diffalign.models.preference.clip_loading import (
    blank,
    blank_tower,
    digest_of,
    fill,
    find_weights,
    pixel_values,
    read_state,
)
from diffalign.scorers.images import AbstractEmbeddingScorer, Images, Prepare
from diffalign.scorers.pixels import levels_of, square, square_levels

WIDTHS = (1024, 128, 64, 16, 1)
"""Outputs of the five layers of version 2."""
_OF_TEXT = ("text_model.", "text_projection.", "logit_scale")
"""Weights of a whole CLIP that its vision tower has not."""


class _Parts(NamedTuple):
    tower: Any
    head: nn.Module


def build_head(names: Mapping[str, Tensor], width: int) -> nn.Module:
    """The head that weights of these names belong to, as far as they belong to one.

    Args:
        names: of the weights.
        width: of the embedding.
    """
    if "weight" in names:
        return nn.Linear(width, 1)
    with_relu = "layers.3.weight" in names
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(zip((width, *WIDTHS), WIDTHS, strict=False)):
        layers.append(nn.Linear(inputs, outputs))
        layers += [nn.ReLU()] * (with_relu and number < 4)
        layers += [nn.Dropout()] * (number < 3)  # it never drops: its place counts in the names
    return nn.ModuleDict({"layers": nn.Sequential(*layers)})


@dataclass(frozen=True, kw_only=True)
class Aesthetic(AbstractEmbeddingScorer):
    """Predicted rating of an image, some 4 to 7; prompts do not matter."""

    path: str = field(metadata=MUST_STAY)
    """A `.safetensors` file of the head. The authors release pickles:
    `diffalign convert sac+logos+ava1-l14-linearMSE.pth output=aesthetic.safetensors`."""
    clip: str = field(default="openai/clip-vit-large-patch14", metadata=MUST_STAY)
    """Folder or hub id of CLIP's ViT-L/14 in the layout of transformers, whole or its vision tower
    alone, or its file of weights."""
    revision: str | None = None
    """Branch, tag or commit of `path`, where it is on the hub."""
    clip_revision: str | None = None
    """Branch, tag or commit of `clip`, where it is on the hub."""

    @cached_property
    def fingerprint(self) -> str:
        config = self._tower_weights.parent / "config.json"
        digest = digest_of(self._weights, self._tower_weights, config)
        return "-".join(["aesthetic", digest, *self.in_half_precision])

    def prepare(self, image: Image.Image) -> Tensor:
        return pixel_values(levels_of(square(image, self._size)) / 127.5 - 1)

    def prepare_levels(self, levels: Tensor) -> Tensor:
        return pixel_values(square_levels(levels, self._size) / 127.5 - 1)

    def score_prepared(self, images: Images, prompts: Sequence[str], prepare: Prepare) -> Tensor:
        head = self._parts.head
        layers = head if isinstance(head, nn.Linear) else head.get_submodule("layers")
        size = self.images_per_batch
        parts = [
            layers(normalize(self.embed_images(prepare(images[start : start + size])), dim=-1))
            for start in range(0, len(images), size)
        ]
        return torch.cat(parts)[:, 0]

    def to(self, device: torch.device | str) -> Aesthetic:
        for part in self._parts:
            part.to(device)
        return self

    @property
    def _size(self) -> int:
        return int(self._parts.tower.config.image_size)

    def embed_images(self, pixels: Tensor) -> Tensor:
        tower = self._parts.tower
        embeddings: Tensor = tower(pixel_values=pixels.to(tower.device, tower.dtype)).image_embeds
        return embeddings.float()

    @cached_property
    def _weights(self) -> Path:
        return find_weights(self.path, revision=self.revision)

    @cached_property
    def _tower_weights(self) -> Path:
        return find_weights(self.clip, revision=self.clip_revision)

    @cached_property
    def _parts(self) -> _Parts:
        state = read_state(self._weights)
        with torch.inference_mode(False):  # else no gradient could ever pass
            tower: Any = blank_tower(str(self._tower_weights.parent))
            seen = read_state(self._tower_weights).items()
            kept = {name: value for name, value in seen if not name.startswith(_OF_TEXT)}
            fill(tower, kept, source=self.clip)
            head: nn.Module = blank(lambda: build_head(state, tower.config.projection_dim))
            fill(head, state, source=self.path)
            tower.requires_grad_(False).eval().to(DTYPES[self.dtype])
            return _Parts(tower, head.requires_grad_(False).eval())
