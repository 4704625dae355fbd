"""A score of the features: the head of a Bradley-Terry reward model.

Source: Stiennon et al. 2020, arXiv:2009.01325, a linear layer on the last hidden state. It is added
to what the encoder says itself, and begins at 0, so that a CLIP begins as the scorer that it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

from diffalign.models.preference.heads.base import AbstractHead, Features, multilayer
from diffalign.ranges import AtLeast


@dataclass(frozen=True, kw_only=True)
class Linear(AbstractHead):
    """One taste: a linear layer, or one with hidden units before it."""

    hidden: Annotated[int, AtLeast(0)] = 0
    """Units between features and score; 0 for a linear layer alone."""
    seed: int = 0
    """Of the initial weights of the hidden units."""

    def build(self, width: int) -> nn.Module:
        return LinearScore([width, *([self.hidden] if self.hidden else []), 1], seed=self.seed)

    def describe(self) -> str:
        return f"a head with {self.hidden} hidden units" if self.hidden else "a linear head"


class LinearScore(nn.Module):
    """Features to a score."""

    def __init__(self, widths: list[int], *, seed: int) -> None:
        super().__init__()
        self.layers = multilayer(widths, seed=seed, last_is_zero=True)

    def forward(self, features: Features, users: Tensor | None) -> Tensor:
        """Scores, shape [n]."""
        added: Tensor = self.layers(features.joint)[:, 0]
        return added if features.plain is None else features.plain + added
