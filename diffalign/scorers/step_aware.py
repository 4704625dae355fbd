"""Score a half-denoised image at its own noise level: the step-aware preference model of SPO.

Weights come from a folder that training wrote (weights, configuration and tokenizer together), or
from a checkpoint of the authors', which has the same names and takes the other two from a CLIP.

Source: Liang et al. 2024, arXiv:2406.04314; preprocessing as in RockeyCoss/SPO,
spo/preference_models, which differs from that of their training in what is clamped when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffalign.config import MUST_STAY
from diffalign.errors import ModelError
from diffalign.models.preference.clip_loading import (
    blank_clip,
    digest_of,
    fill,
    find_weights,
    pixel_values,
    read_state,
    read_tokenizer,
    tokenize,
)
from diffalign.models.preference.time_conditioned_clip import TimeConditionedCLIP
from diffalign.ranges import AtLeast
from diffalign.scorers.base import AbstractScorer

AUTHORS_CLIP = "yuvalkirstain/PickScore_v1"
"""The CLIP that the authors' checkpoints started from."""


def tower_pixels(images: Tensor, size: int) -> Tensor:
    """Decoded images as the vision tower takes them, in the authors' order of scoring.

    The shorter side is resized bicubically while values may still lie outside [-1, 1], the middle
    is cut out, and only then are values clamped. Images that were clamped before, as those of
    `DiffusionModel.decode_images`, so go through the same steps as in the authors' training.

    Args:
        images: shape [n, 3, H, W], float; nominally in [-1, 1].
        size: side of the tower's images, pixels.

    Returns:
        Normalised pixel values, shape [n, 3, size, size], float32.
    """
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    target = (int(height * scale + 0.5), int(width * scale + 0.5))
    resized = interpolate(images.float(), size=target, mode="bicubic", align_corners=False)
    top, left = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return pixel_values(resized[..., top : top + size, left : left + size].clamp(-1, 1))


@dataclass(frozen=True, kw_only=True)
class StepAware(AbstractScorer):
    """Preference of the prompt for an image that was predicted at timestep t, float32."""

    takes_time: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    path: str = field(metadata=MUST_STAY)
    """Folder of a trained model, a `.safetensors` checkpoint with the authors' names, or either on
    the hub: `owner/name`, `owner/name/file.safetensors`. Their own files end in `.bin`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    clip: str | None = None
    """Folder or hub id of the CLIP that gives architecture and tokenizer to a checkpoint that comes
    without; yuvalkirstain/PickScore_v1 for the authors'. Null: they lie next to the weights."""
    clip_revision: str | None = None
    """Branch, tag or commit of that hub id."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, where it does not lie next to the CLIP."""
    allow_pickle: bool = False
    """Read a pickled checkpoint, as tensors alone."""
    images_per_batch: Annotated[int, AtLeast(1)] = 64
    """Images in one pass of the network, which bounds its memory."""

    @cached_property
    def fingerprint(self) -> str:
        return f"step-aware-{digest_of(self._weights)}"

    def score(self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Score one-step predictions of noisy images against their prompts.

        Args:
            images: decoded predictions, shape [n, 3, H, W], float32 in [-1, 1].
            prompts: n of them.
            t: training timesteps at which the predictions were made, shape [n]; 0 for a finished
                image.

        Returns:
            Shape [n], float32, on the device of `images`.

        Raises:
            ValueError: `t` is missing, or counts differ.
            ModelError: the weights cannot be read, or are of another architecture.
        """
        with torch.no_grad():
            return self.score_with_gradient(images, prompts, t)

    def score_with_gradient(
        self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None
    ) -> Tensor:
        if t is None:
            raise ValueError(
                "a step-aware scorer needs t, the timestep of each image: pass zeros to score "
                "finished images, or use a scorer such as pickscore"
            )
        if not len(images) == len(prompts) == len(t):
            raise ValueError(
                f"{len(images)} images, {len(prompts)} prompts and {len(t)} timesteps: one each"
            )
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        length = self._network.text_length
        tokens = tokenize(self._tokenizer, distinct, length=length)
        parts = [
            self._score_part(images[part], t[part], tokens, rows[part])
            for part in torch.arange(len(images)).split(self.images_per_batch)
        ]
        return torch.cat(parts).to(images.device)

    def _score_part(self, images: Tensor, t: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        network, device = self._network, self._network.model.logit_scale.device
        used, text_rows = rows.unique(return_inverse=True)
        pixels = tower_pixels(images.to(device), network.image_size)
        scores: Tensor = network(
            pixels, t.to(device), tokens[used].to(device), text_rows.to(device)
        )
        return scores

    def to(self, device: torch.device | str) -> StepAware:
        self._network.to(device)
        return self

    @cached_property
    def _weights(self) -> Path:
        return find_weights(self.path, revision=self.revision, allow_pickle=self.allow_pickle)

    @cached_property
    def _network(self) -> TimeConditionedCLIP:
        state = _own_names(read_state(self._weights))
        with torch.inference_mode(False):  # else no gradient could ever pass
            network = TimeConditionedCLIP(blank_clip(self._clip, revision=self.clip_revision))
            fill(network, state, source=self.path)
            return network.requires_grad_(False).eval()

    @cached_property
    def _tokenizer(self) -> Any:
        if self.tokenizer is not None:
            return read_tokenizer(self.tokenizer, field="tokenizer")
        return read_tokenizer(self._clip, revision=self.clip_revision)

    @property
    def _clip(self) -> str:
        """Where architecture and tokenizer are."""
        if self.clip is not None:
            return self.clip
        if not (self._weights.parent / "config.json").is_file():
            raise ModelError(
                f"{self.path} is a checkpoint without a CLIP's config.json next to it: set clip to "
                f"the model that it was trained from ({AUTHORS_CLIP} for the authors' checkpoints)"
            )
        return str(self._weights.parent)


def _own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as the network has them, whether or not the checkpoint was saved from inside it."""
    return {name if name.startswith("model.") else f"model.{name}": v for name, v in state.items()}
