"""DPO under another divergence than the reverse KL.

The divergence changes the reward that a policy implies: g(log-ratio) instead of the log-ratio. What
g adds as a constant cancels in a pair, and is left out.

Source: Wang et al. 2023, arXiv:2309.16240. Our alpha is that of TRL since its refactoring:
one minus what it was there before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import Likelihoods, LossOutput
from diffalign.objectives.dpo import dpo_loss
from diffalign.objectives.pair import AbstractPairObjective, Beta
from diffalign.ranges import MoreThan

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


def divergence_score(
    log_ratio: Tensor, *, divergence: Divergence, alpha: float | None = None
) -> Tensor:
    """f'(ratio) of a divergence f, without its constant.

    Args:
        log_ratio: policy minus reference, any shape, in nats.
        divergence: which one.
        alpha: of the alpha divergence alone; 1 is the reverse KL, 0 the forward KL.

    Returns:
        The same shape, rising with the log-ratio, and finite: exponents are held at half of what
        the type can hold, beyond which there is no gradient.
    """
    if divergence == "js":
        return logsigmoid(log_ratio)
    if divergence == "forward_kl":
        alpha = 0.0
    if divergence == "reverse_kl" or alpha == 1:
        return log_ratio
    assert alpha is not None, "the settings were checked"
    largest = math.log(torch.finfo(log_ratio.dtype).max) / 2
    return ((alpha - 1) * log_ratio).clamp(max=largest).exp() / (alpha - 1)


@dataclass(frozen=True, kw_only=True)
class DivergenceDPO(AbstractPairObjective):
    """DPO over one chosen and one rejected view, with a divergence of choice."""

    beta: Beta
    """Pull towards the reference; multiplies the scores of the divergence."""
    divergence: Divergence
    """`reverse_kl` is DPO; `forward_kl`, `js` and `alpha` hold the policy differently."""
    alpha: float | None = None
    """Of the alpha divergence; towards 1 it becomes the reverse KL, at 0 it is the forward KL."""
    scale: Annotated[float, MoreThan(0)] = 1.0
    """Multiplies log-ratios before the divergence. 1 for sums over tokens, which are nats; for
    denoising errors, the beta that DPO would have, with a beta of 1 here: near 0 all divergences
    are alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.divergence == "alpha") != (self.alpha is not None):
            raise ValueError(
                f"divergence is {self.divergence} and alpha is {self.alpha}: alpha belongs to "
                f"divergence alpha, and has to be given there"
            )

    def score(self, view: Likelihoods) -> Tensor:
        """Log-ratios as the divergence sees them."""
        return divergence_score(
            self.scale * view.log_ratio, divergence=self.divergence, alpha=self.alpha
        )

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        return LossOutput(dpo_loss(self.score(chosen) - self.score(rejected), beta=self.beta))

    def note(self) -> str:
        """What beta is not, where log-ratios are scaled before it."""
        return "" if self.scale == 1 else f"log-ratios are multiplied by {self.scale:g} before beta"
