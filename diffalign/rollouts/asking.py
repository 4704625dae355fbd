"""Asking a scorer about what was just sampled: every answer is a number for each image, or NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign import components
from diffalign.errors import DataError
from diffalign.scorers.base import AbstractScorer


def scorer_name(scorer: AbstractScorer) -> str:
    """The last part of its kind."""
    return components.kind_of(scorer).rpartition(".")[2]


def ask(scorer: AbstractScorer, images: Tensor, prompts: Sequence[str], t: int) -> Tensor:
    """Score images that were all predicted at one timestep.

    Args:
        scorer: is told the timestep if it takes one, and otherwise left to believe that the images
            are finished.
        images: shape [n, 3, H, W], nominally in [-1, 1]; the scorer is moved to their device.
        prompts: n of them.
        t: the timestep; 0 for finished images.

    Returns:
        Shape [n], float32, on the CPU; NaN where an image or its score is not finite.

    Raises:
        DataError: the scorer refuses the images, or returns something else than n scores.
    """
    broken = ~images.isfinite().flatten(start_dim=1).all(dim=1).cpu()
    times = torch.full((len(images),), t) if scorer.takes_time else None
    try:
        with torch.no_grad():
            scores = scorer.to(images.device).score(images.nan_to_num(), prompts, times)
    except ValueError as error:
        raise DataError(
            f"the scorer {scorer_name(scorer)} refuses the round's images: {error}"
        ) from error
    if scores.shape != (len(images),):
        raise DataError(
            f"the scorer {scorer_name(scorer)} must give {len(images)} images as many scores, and "
            f"returned the shape {tuple(scores.shape)}"
        )
    scores = scores.float().cpu()
    return scores.masked_fill(broken | ~scores.isfinite(), torch.nan)
