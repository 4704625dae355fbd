"""Scores of opened images, and of copies of them that people would call the same image.

With repeats, a score is the mean over copies, and its standard deviation says how far it can be
trusted: Ctrl-U (arXiv:2410.11236) measures it over samples of one image with other noise. The first
copy is the image as it is; of each other one strips are cut off at its sides, the rest is enlarged
to the old size, noise is added, and it may be mirrored. All of that follows from the content of the
image and the number of the copy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Annotated, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffalign import components
from diffalign import config as configs
from diffalign.batching import each_or_error
from diffalign.data.score_columns import ScoreKey, ScorerIdentity
from diffalign.ranges import AtLeast, Between, Ranged
from diffalign.scorers.base import AbstractScorer
from diffalign.seeding import cpu_generator, derive_seed


@dataclass(frozen=True, kw_only=True)
class Perturbation(Ranged):
    """How copies of an image differ from it."""

    crop: Annotated[float, Between(0, 0.5, without=(0.5,))] = 0.05
    """Largest share of width and height that is cut off, at one side or shared by both."""
    noise: Annotated[float, AtLeast(0)] = 2.0
    """Standard deviation of the noise of every number, in levels of 0 to 255."""
    flip: bool = False
    """Whether half of the copies are mirrored; no where prompts say left and right."""

    def copy(self, pixels: Tensor, digest: str, number: int) -> Tensor:
        """A copy of an image.

        Args:
            pixels: shape [3, H, W], float32 in [-1, 1].
            digest: of the file.
            number: of the copy; 0 is the image itself.

        Returns:
            The same shape and range.
        """
        if number == 0:
            return pixels
        generator = cpu_generator(derive_seed("perturbation", digest, number))
        shares = torch.rand(4, generator=generator)
        flips = torch.rand(1, generator=generator).item() < 0.5
        noise = torch.randn(pixels.shape, generator=generator) * (self.noise / 127.5)
        height, width = pixels.shape[1:]
        top, bottom = _kept(height, self.crop * shares[0].item(), shares[1].item())
        left, right = _kept(width, self.crop * shares[2].item(), shares[3].item())
        cropped = pixels[None, :, top:bottom, left:right]
        if cropped.shape[2:] != pixels.shape[1:]:
            cropped = interpolate(cropped, (height, width), mode="bilinear", antialias=True)
        found = cropped[0].flip(-1) if self.flip and flips else cropped[0]
        return (found + noise).clamp(-1, 1)


def _kept(length: int, share: float, before: float) -> tuple[int, int]:
    """Start and stop of what is left of a side when a share is cut off, part of it before."""
    cut = round(length * share)
    start = round(cut * before)
    return start, length - (cut - start)


def identity_of(
    scorer: AbstractScorer, *, repeats: int, perturbation: Perturbation
) -> ScorerIdentity:
    """Who scores, and how."""
    settings = configs.to_dict(scorer)
    settings.pop("kind")
    return ScorerIdentity(
        kind=components.kind_of(scorer),
        settings=settings,
        fingerprint=scorer.fingerprint,
        repeats=repeats,
        perturbation=asdict(perturbation) if repeats > 1 else None,
    )


class Prompted(Protocol):
    """An image that was opened."""

    @property
    def pixels(self) -> Tensor:
        """Shape [3, H, W], float32 in [-1, 1]."""

    @property
    def prompt(self) -> str:
        """What it was asked to show."""


Item = TypeVar("Item", bound=Prompted)


def scored(
    scorer: AbstractScorer, items: Iterable[Item]
) -> Iterator[tuple[Item, float | Exception]]:
    """Scores of images, or what a scorer raised; those of one size are scored together."""

    def score(batch: Sequence[Item]) -> list[float]:
        images = torch.stack([item.pixels for item in batch])
        with torch.inference_mode():
            scores = scorer.score(images, [item.prompt for item in batch])
        if scores.shape != (len(batch),):
            raise ValueError(
                f"a scorer must return {len(batch)} numbers, got shape {tuple(scores.shape)}"
            )
        return scores.tolist()

    def size(item: Item) -> tuple[int, ...]:
        return tuple(item.pixels.shape)

    for _, group in groupby(sorted(items, key=size), key=size):
        yield from each_or_error(score, list(group))


@dataclass(frozen=True)
class Copy:
    """An image, or a copy of it."""

    key: ScoreKey
    """Of the image."""
    pixels: Tensor
    """Shape [3, H, W], float32 in [-1, 1]."""
    prompt: str


@dataclass(frozen=True)
class Outcome:
    """What copies of one image came to."""

    score: float | None
    """Their mean; None where one of them has no finite score."""
    deviation: float | None = None
    """Their standard deviation, of n - 1; None where there is one."""
    problem: str = ""
    """Why there is no score."""


def copies_of(key: ScoreKey, pixels: Tensor, repeats: int, how: Perturbation) -> list[Copy]:
    """An image and what differs slightly from it, so many in all."""
    digest, prompt = key
    return [Copy(key, how.copy(pixels, digest, number), prompt) for number in range(repeats)]


def outcomes(
    scorer: AbstractScorer, copies: Sequence[Copy], batch_size: int
) -> dict[ScoreKey, Outcome]:
    """Score copies, so many at once; what one image does costs no other its score."""
    scores: dict[ScoreKey, list[float]] = {}
    failed: dict[ScoreKey, Outcome] = {}
    for start in range(0, len(copies), batch_size):
        for item, found in scored(scorer, copies[start : start + batch_size]):
            if isinstance(found, Exception):
                failed[item.key] = Outcome(None, problem=f"{type(found).__name__}: {found}")
            elif not math.isfinite(found):
                failed[item.key] = Outcome(None, problem=f"its score is {found}")
            else:
                scores.setdefault(item.key, []).append(found)
    return {
        key: failed[key] if key in failed else _outcome(scores[key])
        for key in dict.fromkeys(copy.key for copy in copies)
    }


def _outcome(scores: Sequence[float]) -> Outcome:
    spread = statistics.stdev(scores) if len(scores) > 1 else None
    return Outcome(statistics.fmean(scores), spread)
