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
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from diffalign.config import MUST_STAY
from diffalign.errors import ModelError
from diffalign.models.devices import DTYPES
from diffalign.models.preference.clip_loading import digest_of, find_weights
from diffalign.scorers.images import AbstractCosineScorer
from diffalign.scorers.pixels import Filter, middle, resized, short_side_to

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
class CLIPScore(AbstractCosineScorer):
    """100 times the cosine between image and prompt; about 20 to 40 in practice."""

    path: str = field(default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", metadata=MUST_STAY)
    """Folder or hub id in the layout of open_clip: open_clip_config.json and
    open_clip_model.safetensors."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its default branch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("open_clip") is None:
            raise ValueError(
                "the scorer clip needs open_clip, which is not installed: "
                "pip install 'diffalign[clip]', or use scorer.kind pickscore"
            )

    @cached_property
    def fingerprint(self) -> str:
        digest = digest_of(self._weights, self._weights.parent / CONFIG)
        return "-".join(["clip", digest, *self.in_half_precision])

    def prepare(self, image: Image.Image) -> Tensor:
        return self._parts.preprocess(image)

    def prepare_levels(self, levels: Tensor) -> Tensor:
        settings = self._parts.network.visual.preprocess_cfg
        side = settings["size"]
        filter: Filter = "bilinear" if settings["interpolation"] == "bilinear" else "bicubic"
        height, width = (side, side) if isinstance(side, int) else side
        if settings["resize_mode"] == "squash":
            cut = resized(levels, (height, width), filter=filter)
        elif settings["resize_mode"] == "shortest" and height == width:
            cut = middle(short_side_to(levels, height, filter=filter), height)
        else:
            raise ValueError(
                f"{self.path} takes images of {height} x {width} by resize_mode "
                f"{settings['resize_mode']}, through which no gradient is passed: use weights with "
                f"the resize_mode squash or, for square images, shortest"
            )
        mean, std = (levels.new_tensor(settings[key])[:, None, None] for key in ("mean", "std"))
        return (cut / 255 - mean) / std

    @property
    def scale(self) -> float:
        return SCALE

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of the text tower, of length 1, float32 [n, d]."""
        with torch.no_grad():
            return normalize(self.embed_prompts(texts).float(), dim=-1)

    def to(self, device: torch.device | str) -> CLIPScore:
        self._parts.network.to(device)
        return self

    def embed_images(self, pixels: Tensor) -> Tensor:
        network = self._parts.network
        features: Tensor = network.encode_image(
            pixels.to(network.logit_scale.device, network.logit_scale.dtype)
        )
        return features

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
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
            # It samples weights before it reads them; and inference tensors pass no gradient.
            with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
                network, preprocess = open_clip.create_model_from_pretrained(source)
                network.requires_grad_(False).eval().to(DTYPES[self.dtype])
            tokenizer = open_clip.get_tokenizer(source)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            more = "..." if len(reason) > _SHOWN else ""
            raise ModelError(
                f"{self.path} cannot be read as an open_clip model: {reason[:_SHOWN]}{more}"
            ) from error
        return _Parts(network, preprocess, tokenizer)
