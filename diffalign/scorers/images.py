"""Shared by scorers of finished images, which see them as people do, in 8 bits a channel."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from diffalign.imaging.image_files import to_images
from diffalign.scorers.base import AbstractScorer


@dataclass(frozen=True, kw_only=True)
class AbstractImageScorer(AbstractScorer):
    """A scorer of image files: it sees images rounded as files round them."""

    @abc.abstractmethod
    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores of at least one RGB image against its prompt, shape [n], on any device."""

    @property
    def has_features(self) -> bool:
        """Whether the scorer has features of images."""
        return type(self).features is not AbstractImageScorer.features

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Features of RGB images, apart from any prompt, shape [n, d], on any device.

        Images that look alike have features of nearly the same direction.

        Raises:
            NotImplementedError: it has none (see `has_features`).
        """
        raise NotImplementedError(f"{type(self).__name__} has no features of images")

    def score(self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Score finished images against their prompts.

        Args:
            images: shape [n, 3, H, W], float32 in [-1, 1]; what lies outside is cut off.
            prompts: n of them.
            t: must be None.

        Returns:
            Shape [n], float32, on the device of `images`; NaN for an image that is not finite.

        Raises:
            ValueError: `t` is given, or counts differ.
        """
        if t is not None:
            raise ValueError(
                f"{type(self).__name__} scores finished images and takes no timesteps: leave out "
                f"t, or use a step-aware scorer"
            )
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images do not match {len(prompts)} prompts: one each")
        if not prompts:
            return images.new_zeros(0, dtype=torch.float32)
        with torch.no_grad():
            scores = self.score_images(to_images(images), prompts).float().to(images.device)
        broken = ~images.flatten(start_dim=1).isfinite().all(dim=1)  # 8 bits would hide it
        return scores.masked_fill(broken, torch.nan)


def cosines(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    embed_images: Callable[[Sequence[Image.Image]], Tensor],
    embed_prompts: Callable[[Sequence[str]], Tensor],
    images_per_batch: int,
) -> Tensor:
    """Cosine between the embeddings of each image and its prompt, float32 [n].

    Each prompt is embedded once, however many images it has.

    Args:
        images: n of them, RGB.
        prompts: n of them.
        embed_images: m images -> [m, d].
        embed_prompts: m texts -> [m, d].
        images_per_batch: largest number of either that is embedded at once.
    """
    distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    texts = _in_batches(embed_prompts, list(distinct), images_per_batch)
    seen = _in_batches(embed_images, images, images_per_batch)
    return (seen * texts[[distinct[prompt] for prompt in prompts]]).sum(dim=-1)


def embedded(
    embed: Callable[[Sequence[Image.Image]], Tensor], images: Sequence[Image.Image], size: int
) -> Tensor:
    """Normalised embeddings of images, at most `size` at once; float32 [n, d]."""
    with torch.no_grad():
        return _in_batches(embed, images, size)


def _in_batches(embed: Callable[[Sequence], Tensor], items: Sequence, size: int) -> Tensor:
    parts = [embed(items[start : start + size]) for start in range(0, len(items), size)]
    return normalize(torch.cat(parts).float(), dim=-1)
