"""HPS v2 and v2.1: which of two images people preferred for a prompt, as a ViT-H-14 learnt it.

Both versions have one architecture, one preparation and the same names of weights, so that no file
says which it is, and their scores do not compare: name the file after its version. Unlike the CLIP
that they were made of, they see the whole image: its longer side becomes 224 pixels and the rest is
black, where open_clip's own transform cuts off what is beyond a square.

The score is 100 times the cosine, the unit of the tables in the authors' README; their `score`
function leaves out the 100.

Source: Wu et al. 2023, arXiv:2306.09341; tgxs002/HPSv2, img_score.py and src/open_clip.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from diffalign.config import MUST_STAY
from diffalign.errors import ModelError
from diffalign.files import read_json
from diffalign.models.devices import DTYPES
from diffalign.models.preference.clip_loading import (
    digest_of,
    fill,
    find_weights,
    pixel_values,
    read_state,
)
from diffalign.scorers.images import AbstractCosineScorer
from diffalign.scorers.pixels import levels_of

ARCHITECTURE = "ViT-H-14"
"""Of the released weights, by its name in open_clip."""
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
"""Names of the two files that make a folder of open_clip's layout."""
SCALE = 100.0
"""Multiplies the cosine."""


def padded(levels: Tensor, size: int, *, antialias: bool = True) -> Tensor:
    """Images whose longer side is `size`, in the middle of a black square, as the authors have it.

    Args:
        levels: shape [n, 3, H, W], from 0 to 255.
        size: side of the square, pixels.
        antialias: whether the filter widens where an image shrinks.

    Returns:
        Shape [n, 3, size, size]; a bicubic filter may leave values a little outside [0, 255].
    """
    height, width = levels.shape[-2:]
    scale = size / max(height, width)
    new = (round(height * scale), round(width * scale))
    if scale != 1:
        levels = interpolate(
            levels, size=new, mode="bicubic", align_corners=False, antialias=antialias
        )
    below, right = size - new[0], size - new[1]
    return pad(levels, (right // 2, right - right // 2, below // 2, below - below // 2))


@dataclass(frozen=True, kw_only=True)
class HPSv2(AbstractCosineScorer):
    """100 times the cosine between image and prompt; some 25 to 30 in practice."""

    path: str = field(metadata=MUST_STAY)
    """A `.safetensors` file of the released weights, or a folder or hub id in the layout of
    open_clip, whose open_clip_config.json tells the architecture. The authors release pickles:
    `diffalign convert xswu/HPSv2/HPS_v2.1_compressed.pt output=hpsv2.1.safetensors`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its default branch."""
    antialias: bool = True
    """Whether images are smoothed as they shrink. The authors leave it to torchvision, which does
    since 0.17; with those of 2023, when HPS v2 was released, it did not: false."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("open_clip") is None:
            raise ValueError(
                "the scorer hpsv2 needs open_clip, which is not installed: "
                "pip install 'diffalign[clip]', or use scorer.kind pickscore"
            )

    @cached_property
    def fingerprint(self) -> str:
        files = [self._weights, *([self._config] if self._config else [])]
        aliased = () if self.antialias else ("aliased",)
        return "-".join(["hpsv2", digest_of(*files), *aliased, *self.in_half_precision])

    def prepare(self, image: Image.Image) -> Tensor:
        return self.prepare_levels(levels_of(image)[None])[0]

    def prepare_levels(self, levels: Tensor) -> Tensor:
        size = self._network.visual.image_size[0]
        return pixel_values(padded(levels, size, antialias=self.antialias) / 127.5 - 1)

    @property
    def scale(self) -> float:
        return SCALE

    def to(self, device: torch.device | str) -> HPSv2:
        self._network.to(device)
        return self

    def embed_images(self, pixels: Tensor) -> Tensor:
        like = self._network.logit_scale
        features: Tensor = self._network.encode_image(pixels.to(like.device, like.dtype))
        return features

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(list(prompts)).to(self._network.logit_scale.device)
        features: Tensor = self._network.encode_text(tokens)
        return features

    @cached_property
    def _weights(self) -> Path:
        return find_weights(self.path, revision=self.revision, name=WEIGHTS)

    @property
    def _config(self) -> Path | None:
        """Of a folder that has one."""
        config = self._weights.parent / CONFIG
        return config if config.is_file() and not self.path.endswith(".safetensors") else None

    @cached_property
    def _network(self) -> Any:
        import open_clip  # of an extra; __post_init__ has looked for it

        settings = open_clip.get_model_config(ARCHITECTURE)
        if self._config:
            content = read_json(self._config, error=ModelError)
            settings = content.get("model_cfg") if isinstance(content, dict) else None
        with torch.inference_mode(False):  # else no gradient could ever pass
            try:
                with torch.device("meta"):  # sampling weights of a ViT-H would take a minute
                    network = open_clip.CLIP(**settings)
            except (TypeError, ValueError, KeyError) as error:
                raise ModelError(
                    f"{self._config} describes no CLIP of open_clip's under model_cfg: {error}"
                ) from error
            network.to_empty(device="cpu")
            fill(network, read_state(self._weights), source=self.path)
            mask = torch.full(network.attn_mask.shape, -torch.inf).triu(1)  # in no checkpoint
            network.attn_mask = mask
            return network.requires_grad_(False).eval().to(DTYPES[self.dtype])

    @cached_property
    def _tokenizer(self) -> Callable[[list[str]], Tensor]:
        import open_clip

        tokenizer: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(
            context_length=self._network.context_length
        )
        return tokenizer
