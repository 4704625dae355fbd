"""Shared by scorers of finished images, which see them as people do, in 8 bits a channel.

Networks take images of one size. An `AbstractTowerScorer` says twice how an image becomes that: of
a PIL image, as the authors do it, and of tensors, so that a gradient passes.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from diffalign.imaging.image_files import to_images
from diffalign.models.devices import Precision
from diffalign.ranges import AtLeast
from diffalign.scorers.base import AbstractScorer
from diffalign.scorers.pixels import rounded_levels


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
        self._check(images, prompts, t)
        if not prompts:
            return images.new_zeros(0, dtype=torch.float32)
        with torch.no_grad():
            scores = self.score_images(to_images(images), prompts)
        return _without_broken(scores, images)

    def _check(self, images: Tensor, prompts: Sequence[str], t: Tensor | None) -> None:
        if t is not None:
            raise ValueError(
                f"{type(self).__name__} scores finished images and takes no timesteps: leave out "
                f"t, or use a step-aware scorer"
            )
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images do not match {len(prompts)} prompts: one each")


def _without_broken(scores: Tensor, images: Tensor) -> Tensor:
    """Scores on the images' device; NaN where an image is not finite, which 8 bits would hide."""
    broken = ~images.flatten(start_dim=1).isfinite().all(dim=1)
    return scores.float().to(images.device).masked_fill(broken, torch.nan)


Images = Sequence[Image.Image] | Tensor
"""RGB images, or their levels: float32 [n, 3, H, W] from 0 to 255."""
Prepare = Callable[[Images], Tensor]
"""Some of the images -> what the network takes."""


@dataclass(frozen=True, kw_only=True)
class AbstractTowerScorer(AbstractImageScorer):
    """A scorer whose network takes prepared images of one size."""

    differentiable: ClassVar[bool] = True

    images_per_batch: Annotated[int, AtLeast(1)] = 32
    """Images in one pass of the network, which bounds its memory."""
    dtype: Precision = "float32"
    """In which the network computes; scores are float32. Half precision moves them a little."""

    @property
    def in_half_precision(self) -> tuple[str, ...]:
        """Part of a fingerprint: scores in another precision are other scores."""
        return () if self.dtype == "float32" else (self.dtype,)

    @abc.abstractmethod
    def prepare(self, image: Image.Image) -> Tensor:
        """An RGB image as the authors' code hands it to the network, [3, side, side]."""

    @abc.abstractmethod
    def prepare_levels(self, levels: Tensor) -> Tensor:
        """The same of levels in [0, 255], [n, 3, H, W] -> [n, 3, side, side], with a gradient.

        Raises:
            ValueError: no gradient passes through the preparation of these weights.
        """

    @abc.abstractmethod
    def score_prepared(self, images: Images, prompts: Sequence[str], prepare: Prepare) -> Tensor:
        """Scores of images that are still to be prepared, [n], in passes of `images_per_batch`."""

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.score_prepared(images, prompts, self.prepared)

    def prepared(self, images: Images) -> Tensor:
        """RGB images, prepared: [n, 3, side, side]."""
        return torch.stack([self.prepare(image) for image in images])

    def score_with_gradient(
        self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None
    ) -> Tensor:
        self._check(images, prompts, t)
        if not prompts:
            return images.new_zeros(0, dtype=torch.float32)
        levels = rounded_levels(images)
        return _without_broken(self.score_prepared(levels, prompts, self._with_gradient), images)

    def _with_gradient(self, levels: Images) -> Tensor:
        assert isinstance(levels, Tensor)
        return self.prepare_levels(levels)


@dataclass(frozen=True, kw_only=True)
class AbstractEmbeddingScorer(AbstractTowerScorer):
    """A scorer whose network embeds images, apart from any prompt."""

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of RGB images, of length 1, float32 [n, d], on any device."""
        with torch.no_grad():
            return _in_batches(
                lambda some: self.embed_images(self.prepared(some)), images, self.images_per_batch
            )

    @abc.abstractmethod
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embeddings of prepared images, of any length, [n, d]."""


@dataclass(frozen=True, kw_only=True)
class AbstractCosineScorer(AbstractEmbeddingScorer):
    """A multiple of the cosine between the embeddings of an image and of its prompt."""

    @property
    @abc.abstractmethod
    def scale(self) -> Tensor | float:
        """What the cosine is multiplied by."""

    @abc.abstractmethod
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of texts, of any length, [n, d]."""

    def score_prepared(self, images: Images, prompts: Sequence[str], prepare: Prepare) -> Tensor:
        return self.scale * cosines(
            images,
            prompts,
            embed_images=lambda some: self.embed_images(prepare(some)),
            embed_prompts=self.embed_prompts,
            images_per_batch=self.images_per_batch,
        )


def cosines(
    images: Images,
    prompts: Sequence[str],
    *,
    embed_images: Callable[[Images], Tensor],
    embed_prompts: Callable[[Sequence[str]], Tensor],
    images_per_batch: int,
) -> Tensor:
    """Cosine between the embeddings of each image and its prompt, float32 [n].

    Each prompt is embedded once, however many images it has.

    Args:
        images: n of them.
        prompts: n of them.
        embed_images: m images -> [m, d].
        embed_prompts: m texts -> [m, d].
        images_per_batch: largest number of either that is embedded at once.
    """
    distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    texts = _in_batches(embed_prompts, list(distinct), images_per_batch)
    seen = _in_batches(embed_images, images, images_per_batch)
    return (seen * texts[[distinct[prompt] for prompt in prompts]]).sum(dim=-1)


def _in_batches(embed: Callable[[Any], Tensor], items: Any, size: int) -> Tensor:
    parts = [embed(items[start : start + size]) for start in range(0, len(items), size)]
    return normalize(torch.cat(parts).float(), dim=-1)
