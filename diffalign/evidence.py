"""How much a comparison of two models proves: its p-value among others, the prompts that would show
a given win rate, and what looking again and again at growing data does to an interval.

Scores of images are compared by their wins, and other figures, such as shares of responses, by
exchanging what two models did with an image.

Sources: Fisher 1935, The design of experiments, section 21 (signs flipped by chance); Holm 1979, A
simple sequentially rejective multiple test procedure; Fleiss, Levin and Paik 2003, equation 4.14
(sample size of a proportion), with the effective number of trials of Dean and Pagano 2015;
Armitage, McPherson and Rowe 1969, Repeated significance tests on accumulating data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.stats
from numpy.typing import NDArray

from diffalign.intervals import Statistic, Tally, degrees_of_freedom

POWER = 0.8
"""How often so many prompts would show the win rate: what studies are planned for by custom."""
_FLIPS = 9_999
"""Flips of signs; all of them where there are fewer, as with 13 prompts."""
_CHUNK = 2**20
"""Signs held at once."""
_NODES, _GROWN = 256, 1.01
"""Points of the integral over what a look saw, and by how much data grow from one to the next:
points lie closer than a step is long."""


def sign_flip_p_value(net_wins: NDArray[np.float64], *, seed: int = 0) -> float:
    """Two-sided p-value of "neither model is better", by flipping whole prompts.

    If the models were alike, each prompt's wins and losses could as well have been the other way
    round. It needs no other assumption: images of one prompt may resemble each other, and with few
    prompts it is exact, so that five of them can never show a difference at 5 %.

    Args:
        net_wins: wins minus losses of each prompt, shape [prompts].
        seed: of the flips, where there are too many to try all.

    Returns:
        The share of flips that are at least as one-sided; 1 where no prompt decides.
    """
    deciding = net_wins[net_wins != 0]
    if len(deciding) < 2:
        return 1.0
    found = scipy.stats.permutation_test(
        (deciding,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_FLIPS,
        batch=max(1, _CHUNK // len(deciding)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def swap_p_value(first: Tally, other: Tally, statistic: Statistic, *, seed: int = 0) -> float:
    """Two-sided p-value of "neither model is better" of any figure, by exchanging whole clusters.

    If the models were alike, what each did with a cluster could as well have been done by the other
    one. Every figure is computed anew from the exchanged counts, shares of different totals too.

    Args:
        first, other: counts of the same clusters by name, each of shape [clusters].
        statistic: the figure, of summed counts.
        seed: of the exchanges, where there are too many to try all.

    Returns:
        The share of exchanges by which the models differ at least as much; 1 where fewer than two
        clusters differ, or the figure is undefined.
    """
    one, two = (np.stack([np.asarray(t[name], float) for name in first]) for t in (first, other))
    moved = two - one
    deciding = moved[:, moved.any(axis=0)]
    clusters = deciding.shape[1]

    def difference(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """Other less first, [n], after moves of [n, names] from one to the other."""
        before, after = (one.sum(axis=1) + sums).T, (two.sum(axis=1) - sums).T
        named = [dict(zip(first, side, strict=True)) for side in (before, after)]
        return np.asarray(statistic(named[1]) - statistic(named[0]))

    observed = abs(float(difference(np.zeros((1, len(one))))[0]))
    if clusters < 2 or np.isnan(observed):
        return 1.0
    every = clusters < 63 and 2**clusters <= _FLIPS + 1
    rng = np.random.default_rng(seed)
    extreme, tried = (0, 0) if every else (1, 1)
    total = 2**clusters if every else _FLIPS
    at_once = max(1, _CHUNK // clusters)
    for start in range(0, total, at_once):
        count = min(at_once, total - start)
        if every:
            swapped = (np.arange(start, start + count)[:, None] >> np.arange(clusters)) & 1
        else:
            swapped = rng.integers(0, 2, size=(count, clusters))
        found = np.abs(difference(swapped @ deciding.T))
        extreme += int((found >= observed * (1 - 1e-9)).sum())
        tried += count
    return extreme / tried


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values for the claim that *none* of those called small is so by chance, in their order.

    Args:
        p_values: of all comparisons that are looked at together, in [0, 1].
    """
    order = np.argsort(p_values, kind="stable")
    steps = (len(order) - np.arange(len(order))) * np.asarray(p_values, dtype=float)[order]
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return [float(value) for value in adjusted]


@dataclass(frozen=True, kw_only=True)
class PromptsNeeded:
    """How many prompts would show a win rate, with as many images each and as many ties."""

    rate: float
    """The win rate among decided pairs that should be told from one half."""
    prompts: int
    """Of which `POWER` of all comparisons would show it, at the confidence of the intervals."""
    between: tuple[int, int]
    """Where that number lies: how alike the images of a prompt are is itself only estimated."""
    trials_per_prompt: float
    """Independent decided pairs that one prompt is worth."""

    @property
    def in_words(self) -> str:
        """One line for a report."""
        low, high = self.between
        between = "" if low == high else f" ({low:,} to {high:,}, as well as these prompts tell)"
        return (
            f"To see a win rate of {100 * self.rate:.3g}% in {POWER:.0%} of comparisons takes "
            f"{self.prompts:,} prompts{between}: one prompt is worth {self.trials_per_prompt:.2g} "
            f"independent decided pairs."
        )


def prompts_needed(
    wins: NDArray[np.float64],
    losses: NDArray[np.float64],
    *,
    rate: float = 0.55,
    confidence: float = 0.95,
) -> PromptsNeeded | None:
    """Plan a larger comparison from the clustering and the ties of this one.

    Args:
        wins: of each prompt, shape [prompts].
        losses: likewise; ties are in neither.
        rate: to be told from one half, in (0, 1).
        confidence: of the intervals, between 0 and 1.

    Returns:
        None where fewer than two prompts decide: nothing tells how alike their images are.
    """
    decided = wins + losses
    prompts, total = len(decided), float(decided.sum())
    carriers = int((decided > 0).sum())
    if carriers < 2:
        return None
    # Between one trial a prompt, all its images alike, and one a pair, all independent.
    fewest, most = total**2 / float((decided**2).sum()), total
    share = float(wins.sum()) / total
    contributions = wins - share * decided
    variance = carriers / (carriers - 1) * float((contributions**2).sum()) / total**2
    alike = variance == 0 or share in (0, 1)
    trials = fewest if alike else min(most, max(fewest, share * (1 - share) / variance))
    ends = [trials, trials]
    if not alike:
        freedom = degrees_of_freedom(contributions, carriers)
        tails = scipy.stats.chi2.ppf([(1 - confidence) / 2, (1 + confidence) / 2], freedom)
        ends = [min(most, max(fewest, trials * float(q) / freedom)) for q in tails]

    def number(of_all: float) -> int:
        return max(2, math.ceil(trials_needed(rate, confidence) * prompts / of_all))

    return PromptsNeeded(
        rate=rate,
        prompts=number(trials),
        between=(number(ends[1]), number(ends[0])),
        trials_per_prompt=trials / prompts,
    )


def trials_needed(rate: float, confidence: float = 0.95) -> float:
    """Independent trials of which `POWER` of all experiments tell a share from one half."""
    level, power = scipy.stats.norm.ppf([(1 + confidence) / 2, POWER])
    return float((level / 2 + power * math.sqrt(rate * (1 - rate))) ** 2 / (rate - 0.5) ** 2)


@dataclass(frozen=True, kw_only=True)
class Looks:
    """What earlier looks at the same comparison, with fewer pairs, do to an interval."""

    pairs: tuple[int, ...]
    """Pairs of images at each look, rising; the last is the present one."""
    confidence: float
    """Of each interval alone."""
    held: float
    """How often the intervals of all looks hold the truth: what is promised to somebody who may
    have stopped at any of them."""
    needed: float
    """The `confidence` with which all looks together would hold it as often as one promises."""

    @property
    def in_words(self) -> str:
        """One line for a report."""
        earlier = ", ".join(f"{count:,}" for count in self.pairs[:-1])
        return (
            f"This comparison was looked at before, with {earlier} pairs. Who looks again as it "
            f"grows and may stop at any time has intervals that all hold the truth in "
            f"{self.held:.1%}, and not in {self.confidence:.0%}: use confidence={self.needed:.3f}, "
            f"or fix the number of prompts beforehand."
        )


def looks_at(pairs: Sequence[int], confidence: float = 0.95) -> Looks | None:
    """What was seen before; None where this is the first look.

    Args:
        pairs: at each look, rising; the last is the present one.
        confidence: of each interval.
    """
    if len(pairs) < 2:
        return None

    def excess(deviations: float) -> float:
        return _all_within(pairs, deviations) - confidence

    single = float(scipy.stats.norm.ppf((1 + confidence) / 2))
    wider = single
    if excess(single) < -1e-9:
        wider = scipy.optimize.brentq(excess, single, single + 3, xtol=1e-6)
    return Looks(
        pairs=tuple(pairs),
        confidence=confidence,
        held=_all_within(pairs, single),
        needed=float(2 * scipy.stats.norm.cdf(wider) - 1),
    )


def _all_within(pairs: Sequence[int], deviations: float) -> float:
    """Probability that a mean of so many, standardised at every look, never leaves that range.

    The sum of what was seen is a random walk; its density within the range is integrated from look
    to look (Armitage, McPherson and Rowe 1969, equation 2.1).
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    place, density, mass, before = np.zeros(1), np.ones(1), np.ones(1), 0
    for size in pairs:
        if size < _GROWN * before:  # hardly another look
            continue
        step, limit = math.sqrt(size - before), deviations * math.sqrt(size)
        reached = nodes * limit
        moved = (reached[:, None] - place[None, :]) / step
        density = (scipy.stats.norm.pdf(moved) / step) @ (density * mass)
        place, mass, before = reached, weights * limit, size
    return float(density @ mass)
