"""Statistical rejection sampling: pairs of images as the optimal policy would make them.

Images of the model that generated them are accepted with the probability exp((r - r_max) / beta),
so that what is accepted is distributed as the policy which maximises the score under a penalty of
beta on its divergence from that model.

Source: Liu et al. 2023 (RSO), arXiv:2309.06657, appendix A.1 and section 3.3 (first-round ranking).
Their code keys candidates by their text, so that equal ones count once, and fails where more are
asked for than there are; here each image is one candidate, and all are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from diffalign.pair_rules.base import AbstractPairRule, Pair, ScoredGroup, Uniform, decided
from diffalign.ranges import AtLeast, MoreThan


@dataclass(frozen=True, kw_only=True)
class Rejection(AbstractPairRule):
    """Images are accepted by rejection sampling, and paired as they come."""

    beta: Annotated[float, MoreThan(0, "acceptance divides by it")]
    """Strength of the penalty, in units of the score: the smaller, the more only the best are
    accepted. No default: it goes with the spread of the score."""
    keep: Annotated[int, AtLeast(2)] = 8
    """Images accepted of each prompt; the paper takes 8 of 64."""

    def pairs(self, group: ScoredGroup, uniform: Uniform) -> list[Pair]:
        kept = accepted(group.scores, beta=self.beta, keep=self.keep, uniform=uniform)
        return decided(group, list(zip(kept[::2], kept[1::2], strict=False)))

    def describe(self) -> str:
        return (
            f"{self.keep} images of each prompt by rejection sampling at beta {self.beta:g}, "
            f"paired as they were accepted"
        )


def accepted(scores: Sequence[float], *, beta: float, keep: int, uniform: Uniform) -> list[int]:
    """Places of the candidates that rejection sampling accepts, in the order of acceptance.

    The largest score, and who is still a candidate, are settled anew before every pass alone.

    Args:
        scores: of N candidates.
        beta: greater than 0, in units of the scores.
        keep: how many are wanted; of fewer candidates, all are accepted.
        uniform: called once for every candidate that is looked at.
    """
    left, found = list(range(len(scores))), list[int]()
    while left and len(found) < keep:
        highest = max(scores[place] for place in left)
        for place in tuple(left):
            if uniform() < math.exp((scores[place] - highest) / beta):
                found.append(place)
                left.remove(place)
                if len(found) == keep:
                    break
    return found
