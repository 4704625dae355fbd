"""Intervals of figures whose parts come in clusters.

Sentences about one image, and images of one prompt, resemble each other and are no independent
evidence, so whole clusters are resampled: what is kept of a cluster is its share of each sum, and
`scipy.stats.bootstrap` samples clusters with `paired=True`.

With few clusters the percentiles of a bootstrap are too narrow, and where nearly everything went
one way they collapse: five right images of five gave an interval of no width. So `auto` takes only
the spread from the bootstrap. A share gets the score interval of as many independent trials as
would have that spread, which keeps its width at 0 and at 1; every other figure gets Student's
interval under Hall's transformation, longer on the side to which the clusters are skewed. Student's
quantile has the degrees of freedom that the clusters' own contributions have. A figure that all
clusters give alike shows no spread, and unless it is a share it has no interval: no data tell how
large a value is that none of them shows. docs/evaluate-images.md has the measured coverage;
`Bootstrap.cautions` says what a reader is not promised.

Independent trials have the exact interval (`exact_interval`), and labels of several annotators
Krippendorff's alpha (`krippendorff_alpha`), whose parts are sums over units and so can be resampled
like everything else here.

Sources: Cameron, Gelbach and Miller 2008 (pairs cluster bootstrap); Dean and Pagano 2015 (score
intervals of shares from clustered samples: effective sample size and Student's quantile);
Satterthwaite 1946 (degrees of freedom, here from the kurtosis of the contributions); Hall 1992, On
the removal of skewness by transformation; Bahadur and Savage 1956 (without bounds on the values no
interval of a mean can hold for all distributions); Efron 1987
(`bca`); Clopper and Pearson 1934 (`exact_interval`); Krippendorff 2011, Computing Krippendorff's
alpha-reliability (nominal data).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from diffalign.ranges import AtLeast, Between, Ranged

_CHUNK = 2**20
"""Random numbers held at once, so that memory does not grow with clusters times resamples."""
FEW_CLUSTERS = 20
"""Below so many, simulated coverage leaves 93 to 97 %: scripts/interval_coverage.py."""

Tally = Mapping[str, NDArray[np.float64]]
"""Counts by name, all of one shape: [clusters] as counted, [resamples] as resampled, [] in all."""
Statistic = Callable[[Tally], NDArray[np.float64]]
"""A function of a tally of any shape, in that shape; not a number where it is undefined."""
Method = Literal["auto", "percentile", "bca"]


class Interval(NamedTuple):
    """Where a figure lies, at the confidence that was asked for."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Bootstrap(Ranged):
    """How intervals are made."""

    confidence: Annotated[float, Between(0, 1, without=[0, 1])] = 0.95
    """Of the intervals."""
    resamples: Annotated[int, AtLeast(100)] = 10_000
    """How often the clusters are sampled with replacement."""
    seed: int = 0
    """Of the sampling."""
    method: Method = "auto"
    """auto: score intervals of shares and Student's of other figures, with the spread of the
    bootstrap. percentile and bca: scipy's own, too narrow below some 20 clusters."""

    @property
    def describe(self) -> str:
        """How intervals are made, in words, without what was resampled."""
        how = {
            "auto": "score intervals of shares and Student's of other figures, by the spread of",
            "percentile": "percentiles of",
            "bca": "bias-corrected and accelerated percentiles of",
        }
        return f"{how[self.method]} {self.resamples:,} resamples"

    def cautions(self, clusters: int, resampled: str) -> list[str]:
        """Cautions about intervals over so many clusters, for a reader of the figures.

        Args:
            clusters: that were resampled.
            resampled: what they are, in the plural.
        """
        if clusters >= FEW_CLUSTERS:
            return []
        measured = (
            "In simulations of 5 to 10, 95 % intervals of shares held the truth in 95 to 99 %, "
            "and those of means of strongly skewed scores in 91 to 93 %"
            if self.method == "auto"
            else "Percentiles of a bootstrap of so few are too narrow"
        )
        return [
            f"There are only {clusters} {resampled}: intervals are rough. {measured}; "
            f"{FEW_CLUSTERS} or more are better."
        ]

    def intervals(
        self,
        tally: Tally,
        statistics: Mapping[str, Statistic],
        shares: Mapping[str, float] | None = None,
    ) -> dict[str, Interval | None]:
        """One interval a statistic; None where fewer than two clusters leave nothing to resample.

        Args:
            tally: counts of each cluster, every one of shape [clusters].
            statistics: functions of summed counts.
            shares: the statistics that are shares, with what they are at most: 1, or 100 for
                percent.
        """
        clusters = {name: np.asarray(counts, dtype=float) for name, counts in tally.items()}
        if len(next(iter(clusters.values()))) < 2:
            return dict.fromkeys(statistics)
        if self.method == "bca":
            return {name: self._bca(clusters, s) for name, s in statistics.items()}
        resampled = self._resampled(clusters)
        if self.method == "percentile":
            return {
                name: percentile_interval(statistic(resampled), self.confidence)
                for name, statistic in statistics.items()
            }
        return {
            name: self._by_spread(clusters, resampled, statistic, (shares or {}).get(name))
            for name, statistic in statistics.items()
        }

    def _resampled(self, clusters: Tally) -> Tally:
        """Sums [resamples] over as many clusters as there are, sampled with replacement."""

        def sums(*columns: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
            return np.stack([column.sum(axis=axis) for column in columns])

        sampled = self._scipy(clusters, sums, method="percentile").bootstrap_distribution
        return dict(zip(clusters, sampled, strict=True))

    def _bca(self, clusters: Tally, statistic: Statistic) -> Interval | None:
        def of_sums(*columns: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
            sums = [column.sum(axis=axis) for column in columns]
            return statistic(dict(zip(clusters, sums, strict=True)))

        low, high = self._scipy(clusters, of_sums, method="BCa").confidence_interval
        if np.isnan(low) or np.isnan(high):
            return None
        return Interval(float(low), float(high))

    def _scipy(
        self,
        clusters: Tally,
        statistic: Callable[..., NDArray[np.float64]],
        method: Literal["percentile", "BCa"],
    ) -> scipy.stats._resampling.BootstrapResult:
        count = len(next(iter(clusters.values())))
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
            return scipy.stats.bootstrap(
                tuple(clusters.values()),
                statistic,
                paired=True,
                vectorized=True,
                n_resamples=self.resamples,
                batch=max(1, _CHUNK // count),
                confidence_level=self.confidence,
                method=method,
                rng=np.random.default_rng(self.seed),
            )

    def _by_spread(
        self, clusters: Tally, resampled: Tally, statistic: Statistic, top: float | None
    ) -> Interval | None:
        """The interval of one figure from the spread of its resampled values.

        Args:
            clusters: counts of shape [clusters].
            resampled: sums of shape [resamples].
            statistic: the figure.
            top: what it is at most where it is a share, which is at least 0; None for others.
        """
        value = float(statistic({name: np.asarray(c.sum()) for name, c in clusters.items()}))
        sampled = statistic(resampled)
        sampled = sampled[~np.isnan(sampled)]
        if np.isnan(value) or len(sampled) < 2:
            return None
        carriers = int((~np.isnan(statistic(clusters))).sum())
        if carriers < 2:
            return None
        spread = float(sampled.std(ddof=1)) * math.sqrt(carriers / (carriers - 1))
        level = (1 + self.confidence) / 2
        contributions = contributions_of(clusters, statistic)
        freedom = degrees_of_freedom(contributions, carriers)
        quantile = float(scipy.stats.t.ppf(level, freedom))
        if top is None or not 0 <= value <= top:
            if spread < 1e-9 * max(1.0, abs(value)):
                return None
            return skewed_interval(value, spread, quantile, skewness_of_mean(contributions))
        share, spread = value / top, spread / top
        # All clusters agree, or the figure is at an end, from which only resamples without anything
        # to count can differ: as if each were one trial.
        if spread < 1e-9 or share in (0, 1):
            low, high = score_interval(share, carriers, float(scipy.stats.norm.ppf(level)))
        else:
            low, high = score_interval(share, share * (1 - share) / spread**2, quantile)
        return Interval(top * low, top * high)


def grouped_share(values: Sequence[float], groups: Sequence[str]) -> Interval | None:
    """The interval of a mean of n numbers in [0, 1], over resampled groups; None for one group.

    Args:
        values: n of them.
        groups: what each belongs to, such as its prompt.
    """
    tally: dict[str, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        found = tally.setdefault(group, [0.0, 0.0])
        found[0] += value
        found[1] += 1
    sums = np.array([tally[group] for group in sorted(tally)])
    return Bootstrap().intervals(
        {"sum": sums[:, 0], "count": sums[:, 1]},
        {"mean": lambda counted: ratio(counted["sum"], counted["count"])},
        {"mean": 1.0},
    )["mean"]


def score_interval(share: float, trials: float, quantile: float) -> Interval:
    """Wilson's interval: all shares from which `share` is at most `quantile` deviations away.

    Args:
        share: from 0 to 1.
        trials: independent ones, or the effective number of dependent ones; greater than 0.
        quantile: of the normal distribution, or of Student's where the spread was estimated.

    Returns:
        Both ends, from 0 to 1; never of no width.
    """
    square = quantile**2 / trials
    centre = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def exact_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """The interval of Clopper and Pearson: every share under which so many successes, or as extreme
    a number, are not too rare. It never holds the truth less often than promised.

    Args:
        successes: of independent trials with one share.
        trials: at least 1.
        confidence: of the interval.
    """
    found = scipy.stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return Interval(float(found.low), float(found.high))


def agreement_tally(counts: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """What Krippendorff's alpha is made of, by unit: disagreements, and labels of each category.

    Args:
        counts: how many annotators gave a unit each label, [units, categories]; units with fewer
            than two labels say nothing about agreement and count nothing.
    """
    labels = counts.sum(axis=1)
    compared = labels >= 2
    counts, labels = counts[compared], labels[compared]
    disagreements = (labels**2 - (counts**2).sum(axis=1)) / (labels - 1)
    categories = {f"category {k}": counts[:, k] for k in range(counts.shape[1])}
    return {"disagreements": disagreements, **categories}


def krippendorff_alpha(tally: Tally) -> NDArray[np.float64]:
    """Agreement of annotators beyond chance, of nominal labels: 1 where all agree, 0 at chance.

    Args:
        tally: of `agreement_tally`, summed over units.

    Returns:
        At most 1, in the shape of the sums; not a number where there is one category alone.
    """
    categories = np.stack([np.asarray(tally[n]) for n in tally if n.startswith("category")])
    labels = categories.sum(axis=0)
    chance = (labels**2 - (categories**2).sum(axis=0)) / np.maximum(labels - 1, 1)
    return 1 - ratio(np.asarray(tally["disagreements"]), chance)


def majority_excess(counts: NDArray[np.float64]) -> float:
    """How much larger majorities are than those of labels by the toss of a coin, in deviations.

    Args:
        counts: how many annotators gave a unit each of two labels, [units, 2], whole numbers.

    Returns:
        About standard normal where labels are tossed; 0 where no unit has two labels.
    """
    excess = variance = 0.0
    labels = counts.sum(axis=1)
    for given in np.unique(labels[labels >= 2]):
        of = counts[labels == given]
        tossed = np.arange(given + 1)
        chances = scipy.stats.binom.pmf(tossed, given, 0.5)
        shares = np.maximum(tossed, given - tossed) / given
        mean = float((chances * shares).sum())
        excess += float((of.max(axis=1) / given - mean).sum())
        variance += len(of) * float((chances * (shares - mean) ** 2).sum())
    return excess / math.sqrt(variance) if variance else 0.0


def skewed_interval(value: float, spread: float, quantile: float, skewness: float) -> Interval:
    """Student's interval under Hall's transformation g(t) = t + s t^2 / 3 + s^2 t^3 / 27 + s / 6.

    Args:
        value: the figure.
        spread: its standard error.
        quantile: of Student's distribution, how many deviations a symmetric figure would get.
        skewness: s, of the figure itself: that of the clusters over the root of their number.
    """

    def untransformed(to: float) -> float:
        if abs(skewness) < 1e-6:
            return to
        return 3 / skewness * (float(np.cbrt(1 + skewness * (to - skewness / 6))) - 1)

    return Interval(
        value - untransformed(quantile) * spread, value - untransformed(-quantile) * spread
    )


def contributions_of(clusters: Tally, statistic: Statistic) -> NDArray[np.float64]:
    """What each cluster adds to a figure: how much it falls where the cluster is left out, less
    the mean of that.

    Args:
        clusters: counts of shape [clusters].
        statistic: the figure.

    Returns:
        Shape [clusters] at most; those without which the figure is undefined are absent.
    """
    left = statistic({name: counts.sum() - counts for name, counts in clusters.items()})
    left = left[~np.isnan(left)]
    return left.mean() - left if len(left) else left


def skewness_of_mean(contributions: NDArray[np.float64]) -> float:
    """Skewness of the mean of such contributions, as far as they tell it; 0 where all are equal."""
    if len(contributions) == 0 or not contributions.any():
        return 0.0
    second, third = (contributions**2).mean(), (contributions**3).mean()
    return float(third / second**1.5 / math.sqrt(len(contributions)))


def degrees_of_freedom(contributions: NDArray[np.float64], carriers: int) -> float:
    """How well the spread of a figure is known: 2 n / (kurtosis - 1), from 2 up to n - 1.

    The spread is a mean of squared contributions. Where a few clusters carry most of it, it is
    known as badly as if there were only those few.

    Args:
        contributions: of `contributions_of`.
        carriers: clusters that can contribute, at least 2.
    """
    second, fourth = (contributions**2).sum(), (contributions**4).sum()
    if second**2 == 0:
        return carriers - 1
    kurtosis = carriers * fourth / second**2
    return float(
        np.clip(2 * carriers / max(kurtosis - 1, 1e-9), min(2, carriers - 1), carriers - 1)
    )


def percentile_interval(values: NDArray[np.float64], confidence: float) -> Interval | None:
    """The middle share of resampled values; None where every one of them is undefined."""
    if np.isnan(values).all():
        return None
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Part over whole; not a number where the whole is zero."""
    part, whole = np.asarray(part, dtype=float), np.asarray(whole, dtype=float)
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole != 0)
