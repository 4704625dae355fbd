"""CLIP score: how well an image matches its prompt, as an open_clip model sees it.

The cosine times 100, as torchmetrics and most papers on text-to-image models give it, without their
cut at 0, which would make bad images equal. Hessel et al. multiply by 2.5 instead. Scores of
different CLIPs do not compare.

Source: Hessel et al. 2021, arXiv:2104.08718. The default model is the one of clip_utils.py in
SalesforceAIResearch/DiffusionDPO.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from diffalign.config import MUST_STAY
from diffalign.errors import ModelError
from diffalign.models.preference.clip_loading import digest_of, find_weights
from diffalign.ranges import AtLeast
from diffalign.scorers.images import AbstractImageScorer, cosines, embedded

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
"""Names of the two files that make a folder of open_clip's layout."""
SCALE = 100.0
"""Multiplies the cosine."""
_SHOWN = 300
"""Characters of a foreign error message that are repeated."""


class _Parts(NamedTuple):
    network: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]


@dataclass(frozen=True, kw_only=True)
class CLIPScore(AbstractImageScorer):
    """100 times the cosine between image and prompt; about 20 to 40 in practice."""

    path: str = field(default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", metadata=MUST_STAY)
    """Folder or hub id in the layout of open_clip: open_clip_config.json and
    open_clip_model.safetensors."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its default branch."""
    images_per_batch: Annotated[int, AtLeast(1)] = 32
    """Images in one pass of the network, which bounds its memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("open_clip") is None:
            raise ValueError(
                "the scorer clip needs open_clip, which is not installed: "
                "pip install 'diffalign[clip]', or use scorer.kind pickscore"
            )

    @cached_property
    def fingerprint(self) -> str:
        return f"clip-{digest_of(self._weights, self._weights.parent / CONFIG)}"

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return SCALE * cosines(
            images,
            prompts,
            embed_images=self._embed_images,
            embed_prompts=self._embed_prompts,
            images_per_batch=self.images_per_batch,
        )

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of the image tower, of length 1."""
        return embedded(self._embed_images, images, self.images_per_batch)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of the text tower, of length 1, float32 [n, d]."""
        with torch.no_grad():
            return normalize(self._embed_prompts(texts).float(), dim=-1)

    def to(self, device: torch.device | str) -> CLIPScore:
        self._parts.network.to(device)
        return self

    def _embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        network, preprocess, _ = self._parts
        pixels = torch.stack([preprocess(image) for image in images])
        features: Tensor = network.encode_image(pixels.to(network.logit_scale.device))
        return features

    def _embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        network, _, tokenizer = self._parts
        tokens = tokenizer(list(prompts))
        features: Tensor = network.encode_text(tokens.to(network.logit_scale.device))
        return features

    @cached_property
    def _weights(self) -> Path:
        weights = find_weights(self.path, revision=self.revision, allow_pickle=False, name=WEIGHTS)
        if weights.name != WEIGHTS:
            raise ModelError(
                f"{self.path} is a file: give the folder or hub id that holds {WEIGHTS} and "
                f"{CONFIG}"
            )
        return weights

    @cached_property
    def _parts(self) -> _Parts:
        import open_clip  # of an extra; __post_init__ has looked for it

        source = f"local-dir:{self._weights.parent}"
        try:
            with torch.random.fork_rng(devices=[]):  # it samples weights before it reads them
                network, preprocess = open_clip.create_model_from_pretrained(source)
            tokenizer = open_clip.get_tokenizer(source)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            more = "..." if len(reason) > _SHOWN else ""
            raise ModelError(
                f"{self.path} cannot be read as an open_clip model: {reason[:_SHOWN]}{more}"
            ) from error
        return _Parts(network.requires_grad_(False).eval(), preprocess, tokenizer)
