"""Whether probabilities of preferences come true: reliability curves, and the expected calibration
error.

Of each pair the side is looked at that is said to be the likelier winner. Pairs are put into bins
of that probability; in a bin, how often the side wins should be what was said.

Sources: Guo et al. 2017, arXiv:1706.04599, eq. 2 and 3 (bins of equal width); Zeng et al. 2023,
arXiv:2312.07401 (the calibration of reward models, which goes with what is aligned by them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.intervals import Interval, grouped_share

BINS = 10
"""Of probabilities between one half and 1."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Pairs whose likelier side has about one probability."""

    low: float
    high: float
    """Bounds of that probability; the upper one belongs to it, and one half to the first bin."""
    pairs: int
    said: float
    """Mean probability of the likelier side."""
    came_true: float
    """How often that side won; a label that is itself a probability counts as such."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """A reliability curve."""

    bins: tuple[Bin, ...]
    """Those that hold a pair, rising."""
    pairs: int

    @property
    def error(self) -> float:
        """Expected calibration error: mean over pairs of |came true - said| of their bin."""
        return sum(b.pairs * abs(b.came_true - b.said) for b in self.bins) / self.pairs


def reliability(margins: Sequence[float], labels: Sequence[float] | None = None) -> Reliability:
    """The curve of n pairs.

    Args:
        margins: log-odds that the first side of each pair wins, n of them, at least one.
        labels: probability that it does, in [0, 1]; None for 1. Those of one half say nothing
            about whether the likelier side won, and count as such.
    """
    odds = np.asarray(margins, dtype=np.float64)
    truth = np.ones_like(odds) if labels is None else np.asarray(labels, dtype=np.float64)
    said = 1 / (1 + np.exp(-np.abs(odds)))
    true = np.where(odds > 0, truth, np.where(odds < 0, 1 - truth, 0.5))
    edges = np.linspace(0.5, 1.0, BINS + 1)
    places = np.clip(np.searchsorted(edges, said, side="left") - 1, 0, BINS - 1)
    bins = [
        Bin(
            low=float(edges[place]),
            high=float(edges[place + 1]),
            pairs=int(inside.sum()),
            said=float(said[inside].mean()),
            came_true=float(true[inside].mean()),
        )
        for place in range(BINS)
        if (inside := places == place).any()
    ]
    return Reliability(bins=tuple(bins), pairs=len(odds))


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What scores say of pairs that people labelled."""

    accuracy: float
    """How often the preferred side has the higher score; equal scores count one half."""
    interval: Interval | None
    """Of it at 95 %, over resampled prompts; None where there are fewer than two."""
    curve: Reliability
    """With differences of scores taken for log-odds."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        low, high = (None, None) if self.interval is None else self.interval[:2]
        return {
            "pairs": self.curve.pairs,
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "ece": self.curve.error,
            "bins": [vars(b) for b in self.curve.bins],
        }


def agreement(
    gaps: Sequence[float], labels: Sequence[float], prompts: Sequence[str]
) -> Agreement | None:
    """How scores agree with labels; None where no pair is decided.

    Args:
        gaps: score of the first side of n pairs less that of the second.
        labels: probability that the first side is the better one; pairs of one half are left out.
        prompts: n of them.
    """
    decided = [n for n, label in enumerate(labels) if label != 0.5]
    if not decided:
        return None
    some: NDArray[np.float64] = np.array([gaps[n] for n in decided])
    truth = np.array([labels[n] for n in decided])
    right = (np.sign(some * np.sign(truth - 0.5)) + 1) / 2
    interval = grouped_share(right.tolist(), [prompts[n] for n in decided])
    return Agreement(
        accuracy=float(right.mean()),
        interval=interval,
        curve=reliability(some.tolist(), truth.tolist()),
    )
