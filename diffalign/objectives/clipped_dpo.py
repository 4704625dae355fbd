"""DPO on single steps of a sampler, with log-ratios that count only within a clip range.

D3PO and SPO share this loss over transition likelihoods; they differ in where their pairs of steps
come from, and in beta. A log-ratio beyond the range is clamped, and then has no gradient on either
side, not even where a step would lead back into the range: PPO's min/max form differs there.

Sources: Yang et al. 2023, arXiv:2311.13231 (D3PO), as in scripts/rm/train_d3po.py of yk7333/d3po;
Liang et al. 2024, arXiv:2406.04314 (SPO), as in train_scripts/train_spo.py of RockeyCoss/SPO.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.objectives.base import Likelihoods, LossOutput, Measure
from diffalign.objectives.pair import AbstractPairObjective, Beta
from diffalign.ranges import Between


def clipped_log_ratio(log_ratio: Tensor, *, clip: float) -> Tensor:
    """Log of the probability ratio, held within [1 - clip, 1 + clip].

    Args:
        log_ratio: policy minus reference, any shape; with the published clip range of 0.1, of
            log-densities that are means over latent dimensions.
        clip: how far the ratio may leave 1, between 0 and 1.

    Returns:
        The same shape, in [log(1 - clip), log(1 + clip)]; no gradient where it was clamped.
    """
    return log_ratio.clamp(math.log1p(-clip), math.log1p(clip))


@dataclass(frozen=True, kw_only=True)
class ClippedDPO(AbstractPairObjective):
    """DPO over clipped log-ratios of one chosen and one rejected step."""

    reads: ClassVar[frozenset[Measure]] = frozenset({"step log-density"})

    beta: Beta
    """Pull towards the reference. No default: D3PO has 0.1 and SPO 10, over mean log-densities."""
    clip: Annotated[
        float, Between(0, 1, "it bounds a ratio to [1 - clip, 1 + clip]", without=[0, 1])
    ] = 0.1
    """How far a probability ratio may leave 1 before it stops to count; 0.1 in both methods."""

    def score(self, view: Likelihoods) -> Tensor:
        """The log-ratio, clipped."""
        return clipped_log_ratio(view.log_ratio, clip=self.clip)

    def pair_loss(self, chosen: Likelihoods, rejected: Likelihoods) -> LossOutput:
        margin = self.score(chosen) - self.score(rejected)
        sides = (chosen, rejected)
        metrics = {
            "clipped": _mean_of_sides(
                (side.log_ratio != self.score(side)).to(margin.dtype) for side in sides
            ),
            "abs_log_ratio": _mean_of_sides(side.log_ratio.detach().abs() for side in sides),
        }
        return LossOutput(-logsigmoid(self.beta * margin), metrics)

    def note(self) -> str:
        """Why the loss of a healthy run hardly moves."""
        widest = self.beta * (math.log1p(self.clip) - math.log1p(-self.clip))
        low = math.log1p(math.exp(-widest))
        return (
            f"ratios are clipped to {1 - self.clip:g} to {1 + self.clip:g}, so the loss stays "
            f"between {low:.3f} and {low + widest:.3f}, and near {math.log(2):.3f} while ratios "
            f"are near 1: watch the scores, abs_log_ratio and clipped instead"
        )


def _mean_of_sides(sides: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(sides)).mean(dim=0)
