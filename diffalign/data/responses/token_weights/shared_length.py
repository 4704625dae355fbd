"""Tokens of the longer response beyond the length of the shorter one count less.

Source: LD-DPO (Liu et al. 2024, arXiv:2409.06411): DPO prefers long responses because their
log-likelihoods are sums over more tokens. alpha 1 is DPO, 0 cuts both to one length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from diffalign.data.responses.token_weights.base import AbstractTokenWeights, Encoded, Spans
from diffalign.ranges import Between


@dataclass(frozen=True, kw_only=True)
class SharedLength(AbstractTokenWeights):
    """1 up to the length that two responses share, `alpha` beyond it."""

    alpha: Annotated[float, Between(0, 1)]
    """Weight of the tokens beyond, 0 to 1. No default: the paper tunes it for each model."""
    between: tuple[str, ...] = ("chosen", "rejected")
    """The two responses that are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.between)) != 2:
            raise ValueError(f"between must name two responses, got {list(self.between)}")

    def reads(self, response: str) -> frozenset[str]:
        return frozenset({response, *self.between})

    def weigh(self, response: str, encoded: Encoded, spans: Spans) -> Tensor:
        shared = min(len(encoded[name].tokens) for name in self.between)
        weights = torch.ones(len(encoded[response].tokens))
        weights[shared:] = self.alpha
        return weights
