"""Which of several judged responses to one question make pairs.

Source: RLAIF-V (Yu et al. 2024, arXiv:2405.17220).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

Pair = tuple[str, str]
"""The better response and the worse one."""

_RATIOS = tuple(step / 50 for step in range(50))
"""0, .02, ..., .98: how much longer the worse response may be, as a share of its own length."""


def scored_pairs(
    responses: Sequence[str], scores: Sequence[float], *, min_gap: float
) -> list[Pair]:
    """Pairs whose scores differ enough, the widest gaps first.

    Args:
        responses: distinct.
        scores: one a response, higher is better; RLAIF-V takes minus the number of claims in it
            that were judged false.
        min_gap: least difference of the scores of a pair; 1 in RLAIF-V.
    """
    both = permutations(range(len(responses)), 2)
    wide = [(i, j) for i, j in both if scores[i] - scores[j] >= max(min_gap, 0.0)]
    different = [(i, j) for i, j in wide if scores[i] > scores[j]]
    different.sort(key=lambda pair: scores[pair[1]] - scores[pair[0]])  # stable
    return [(responses[i], responses[j]) for i, j in different]


def length_excess(better: str, worse: str) -> float:
    """How much longer the worse response is, as a share of its length in words."""
    long = max(1, len(worse.split()))
    return (long - len(better.split())) / long


def length_bound(pairs: Sequence[Pair]) -> float:
    """The bound on `length_excess` under which both sides are most equally long on average.

    Of 0, .02, ..., .98; the largest of equally good ones, which keeps most.

    Args:
        pairs: of the whole data set, at least one.
    """

    def imbalance(bound: float) -> float:
        kept = [pair for pair in pairs if length_excess(*pair) <= bound]
        if not kept:
            return float("inf")
        words = sum(len(worse.split()) - len(better.split()) for better, worse in kept)
        return abs(words) / len(kept)

    return min(reversed(_RATIOS), key=imbalance)
