"""PAL: every person has an ideal point, a mixture of a few prototypes that all people share.

    score of an item x for a user u = -scale * |f(x) - sum_k softmax(w_u)_k p_k|

f is learnt, and so are the prototypes p, the mixtures w and the scale. A person of whom there are a
few verdicts needs no more than a mixture of K numbers.

Source: Chen et al. 2024, arXiv:2406.08469 (PAL-A); RamyaLab/pluralistic-alignment, src/pal_rm_a:
`PrefLearner_dist_logistic` with users `Pw`. Theirs begins at a scale of 1 / 0.07; here it is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from diffalign.models.preference.heads.base import AbstractHead, Features, multilayer
from diffalign.ranges import AtLeast
from diffalign.seeding import cpu_generator

LARGEST_SCALE = 100.0
"""What the learnt scale is held below, as in CLIP and in the authors' code."""


@dataclass(frozen=True, kw_only=True)
class PAL(AbstractHead):
    """A taste for each user."""

    users: tuple[str, ...]
    """Everybody whose verdicts are trained on, by what the column `data.users` calls them."""
    prototypes: Annotated[int, AtLeast(1)] = 2
    """How many tastes all others are mixtures of (K)."""
    dimensions: Annotated[int, AtLeast(1)] = 16
    """Of the space in which items and ideal points lie."""
    hidden: Annotated[int, AtLeast(0)] = 64
    """Units between the features of an item and its point; 0 for a linear map."""
    seed: int = 0
    """Of all initial weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.users or len(set(self.users)) < len(self.users):
            raise ValueError(
                f"users names everybody once whose verdicts are trained on, got "
                f"{', '.join(self.users) or 'nobody'}"
            )

    @property
    def known_users(self) -> tuple[str, ...]:
        return self.users

    def build(self, width: int) -> nn.Module:
        widths = [width, *([self.hidden] if self.hidden else []), self.dimensions]
        return IdealPoints(
            widths, prototypes=self.prototypes, users=len(self.users), seed=self.seed
        )

    def describe(self) -> str:
        return f"{len(self.users)} users as mixtures of {self.prototypes} tastes (PAL)"


class IdealPoints(nn.Module):
    """Features and users to scores."""

    def __init__(self, widths: list[int], *, prototypes: int, users: int, seed: int) -> None:
        super().__init__()
        generator = cpu_generator(seed)
        spread = widths[-1] ** -0.5
        self.item = multilayer(widths, seed=seed)
        self.prototypes = nn.Parameter(
            torch.randn(prototypes, widths[-1], generator=generator) * spread
        )
        self.mixtures = nn.Parameter(torch.randn(users, prototypes, generator=generator))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, features: Features, users: Tensor | None) -> Tensor:
        """Scores, shape [n]."""
        assert users is not None, "the head knows its users"
        ideal = self.mixtures.softmax(dim=1)[users] @ self.prototypes
        scale = self.log_scale.exp().clamp(max=LARGEST_SCALE)
        scores: Tensor = -scale * torch.linalg.vector_norm(self.item(features.joint) - ideal, dim=1)
        return scores
