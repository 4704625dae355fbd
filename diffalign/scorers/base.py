"""The contract of a scorer: one float per image and prompt, higher is better."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.ranges import Ranged


@dataclass(frozen=True, kw_only=True)
class AbstractScorer(Ranged, abc.ABC):
    """A function of an image and a prompt; its fields are the settings of a config.

    Weights, where a scorer has any, are loaded on first use, never at construction: building a
    config must stay cheap.
    """

    takes_time: ClassVar[bool] = False
    """Whether it scores noisy images and needs their timestep: `score(..., t)`."""
    compares: ClassVar[bool] = False
    """Whether a score is what an image wins against the others of its prompt that are scored with
    it: only all images of a prompt together have scores."""
    differentiable: ClassVar[bool] = False
    """Whether it can pass a gradient to the images: `score_with_gradient`."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Identifies the score: equal fingerprints give equal scores for equal images."""

    @abc.abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Score images against their prompts.

        Args:
            images: shape [n, 3, H, W], float32 in [-1, 1]; those of a noisy image may lie outside.
            prompts: n of them, one per image.
            t: timesteps of shape [n] for scorers that score noisy images; others refuse it.

        Returns:
            Shape [n], float32, higher is better.
        """

    def score_with_gradient(
        self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None
    ) -> Tensor:
        """Scores as functions of the images, for backpropagation; weights get no gradient.

        Args:
            images, prompts, t: see `score`. Rounding to 8 bits, where a scorer rounds, passes the
                gradient as if it did nothing; a value outside [-1, 1] gets none.

        Returns:
            Shape [n], float32; within 1e-3 of `score`.

        Raises:
            ValueError: the scorer is not `differentiable`.
        """
        raise ValueError(
            f"the scorer {type(self).__name__} passes no gradient to images, and one is asked for: "
            f"use one of clip, pickscore, hpsv2, imagereward, aesthetic or step_aware"
        )

    def refuse_comparing(self, place: str) -> None:
        """Raise ValueError where images are scored one by one, and the scorer compares them.

        Args:
            place: who scores them so, as the start of a sentence.
        """
        if self.compares:
            raise ValueError(
                f"{place} scores every image by itself, and {type(self).__name__} compares the "
                f"images of a prompt: `diffalign score` and rollouts d3po take it"
            )

    def to(self, device: torch.device | str) -> Any:
        """Move weights, if there are any; returns the scorer itself."""
        return self
