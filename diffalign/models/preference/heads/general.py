"""General preference embeddings: which of two images is preferred, without a score of either.

    log-odds that y is preferred to z = <R v(y), v(z)> / tau,   R = diag([[0, -1], [1, 0]], ...)

The product is skew-symmetric, so that turning a pair round turns its sign, and preferences may go
round in a circle, which no score can say.

Source: Zhang et al. 2024, arXiv:2410.02197 (GPM); general-preference/general-preference-model,
`HighDimGeneralPreferenceLoss` and its tau of 0.1. The weight that they give each block by the
prompt (`add_prompt_head`) is left out: all blocks count alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn

from diffalign.models.preference.heads.base import AbstractHead, Features, multilayer
from diffalign.ranges import AtLeast, MoreThan


def general_preference(first: Tensor, second: Tensor, *, tau: float) -> Tensor:
    """Log-odds that the first of two is preferred.

    Args:
        first, second: embeddings, shape [n, 2k].
        tau: what the product is divided by, greater than 0.

    Returns:
        Shape [n]; the negative for the other order, and 0 for one embedding against itself.
    """
    a, b = first[:, ::2], first[:, 1::2]
    c, d = second[:, ::2], second[:, 1::2]
    return (a * d - b * c).sum(dim=1) / tau


@dataclass(frozen=True, kw_only=True)
class General(AbstractHead):
    """Embeddings of 2k numbers, compared by a skew-symmetric product."""

    compares: ClassVar[bool] = True

    blocks: Annotated[int, AtLeast(1)] = 4
    """k: how many planes there are in which preferences can go round."""
    tau: Annotated[float, MoreThan(0, "the product is divided by it")] = 0.1
    """Temperature of the log-odds."""
    hidden: Annotated[int, AtLeast(0)] = 0
    """Units between features and embedding; 0 for a linear map."""
    seed: int = 0
    """Of the initial weights."""

    def build(self, width: int) -> nn.Module:
        widths = [width, *([self.hidden] if self.hidden else []), 2 * self.blocks]
        return _Embedding(widths, seed=self.seed)

    def sides(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        half = general_preference(chosen, rejected, tau=self.tau) / 2
        return half, -half

    def describe(self) -> str:
        return f"general preference embeddings of {2 * self.blocks} numbers (GPM)"


class _Embedding(nn.Module):
    def __init__(self, widths: list[int], *, seed: int) -> None:
        super().__init__()
        self.layers = multilayer(widths, seed=seed)

    def forward(self, features: Features, users: Tensor | None) -> Tensor:
        """Embeddings, shape [n, 2k]."""
        found: Tensor = self.layers(features.joint)
        return found
