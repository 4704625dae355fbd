"""The contract of a pair judge, both orders of a pair, and what images of a prompt win.

Who is shown two images leans to a place: models prefer the first one, or the second, whatever they
show (Zheng et al. 2023, arXiv:2306.05685). So a pair is asked about in both orders, its preference
is their mean, and the mean probability of the place is the figure of the bias.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from diffalign.ranges import Ranged


@dataclass(frozen=True, kw_only=True)
class AbstractPairJudge(Ranged, abc.ABC):
    """A function of two images and a prompt; its fields are the settings of a config."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Identifies the verdict: equal fingerprints give equal ones for equal images."""

    @abc.abstractmethod
    def prefers(
        self, first: Sequence[Image.Image], second: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Tensor:
        """Probabilities that the first of two images is the better one for the prompt.

        Args:
            first, second: n RGB images each, shown in this order.
            prompts: n of them.

        Returns:
            Shape [n], float32, 0 to 1, on any device.

        Raises:
            ValueError: a pair cannot be judged.
        """

    def to(self, device: torch.device | str) -> Any:
        """Move weights, if there are any; returns the judge itself."""
        return self


class BothOrders(NamedTuple):
    """Verdicts on n pairs, each shown in both orders, [n] each."""

    forward: Tensor
    """Probability that image a is preferred, where a is shown first."""
    backward: Tensor
    """Probability that image b is preferred, where b is shown first."""

    @property
    def preference(self) -> Tensor:
        """Probability that image a is preferred: the mean of both orders."""
        return (self.forward + 1 - self.backward) / 2


def in_both_orders(
    judge: AbstractPairJudge,
    a: Sequence[Image.Image],
    b: Sequence[Image.Image],
    prompts: Sequence[str],
) -> BothOrders:
    """Ask about n pairs of images, each in both orders."""
    with torch.no_grad():
        asked = judge.prefers([*a, *b], [*b, *a], [*prompts, *prompts])
    if asked.shape != (2 * len(prompts),):
        raise ValueError(
            f"a pair judge must return {2 * len(prompts)} numbers, got shape {tuple(asked.shape)}"
        )
    forward, backward = asked.double().cpu().chunk(2)
    return BothOrders(forward, backward)


def every_pair(count: int) -> list[tuple[int, int]]:
    """All pairs of so many images, each once."""
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def win_rates(
    count: int, pairs: Sequence[tuple[int, int]], preferences: Sequence[float]
) -> list[float | None]:
    """What each of some images wins: its mean probability of being preferred to the others.

    Args:
        count: images.
        pairs: places of the two images of each pair.
        preferences: for each pair, probability that the first is preferred.

    Returns:
        One number an image, 0 to 1; None for one that is in no pair.
    """
    won: list[list[float]] = [[] for _ in range(count)]
    for (i, j), p in zip(pairs, preferences, strict=True):
        won[i].append(p)
        won[j].append(1 - p)
    return [sum(each) / len(each) if each else None for each in won]
