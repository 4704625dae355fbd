"""How often intervals of a win rate, and of a difference of scores, hold the truth.

    python scripts/interval_coverage.py                        # the table of docs/log.md
    python scripts/interval_coverage.py --method percentile    # the same of scipy's percentiles
    python scripts/interval_coverage.py --difference --rates 0.05    # of a mean that is no share

Prompts differ: the chance of winning is sampled for each from a beta distribution, so that the
images of one prompt agree with a correlation of --alike. Every cell simulates --trials comparisons
of --images images a prompt. With --difference a win is a difference of 1 and all else one of 0, and
the mean has the interval of any figure that is no share.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from diffalign.intervals import Bootstrap, Method, Tally, ratio

PROMPTS = (5, 10, 20, 36, 100)
RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97)


def mean(tally: Tally) -> NDArray[np.float64]:
    return ratio(tally["sum"], tally["items"])


def wins(rng: np.random.Generator, prompts: int, images: int, rate: float, alike: float) -> Tally:
    """Wins of each prompt, out of its images."""
    weight = (1 - alike) / alike if alike else np.inf
    chance = rng.beta(rate * weight, (1 - rate) * weight, prompts) if alike else rate
    won = rng.binomial(images, chance, prompts)
    return {"sum": won.astype(float), "items": np.full(prompts, float(images))}


def coverage(
    rng: np.random.Generator,
    bootstrap: Bootstrap,
    shares: Mapping[str, float],
    trials: int,
    prompts: int,
    images: int,
    rate: float,
    alike: float,
) -> tuple[float, float]:
    """Share of intervals that hold the rate, and their mean width."""
    held, width = 0, 0.0
    for _ in range(trials):
        tally = wins(rng, prompts, images, rate, alike)
        found = bootstrap.intervals(tally, {"mean": mean}, shares)["mean"]
        if found is not None:
            held += found.low - 1e-12 <= rate <= found.high + 1e-12
            width += found.high - found.low
    return held / trials, width / trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=get_args(Method), default="auto")
    parser.add_argument("--difference", action="store_true", help="of a mean that is no share")
    parser.add_argument("--trials", type=int, default=1000, help="comparisons a cell")
    parser.add_argument("--resamples", type=int, default=300)
    parser.add_argument("--images", type=int, default=5, help="of each prompt")
    parser.add_argument("--alike", type=float, default=0.1, help="correlation within a prompt")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    given = parser.parse_args()
    bootstrap = Bootstrap(method=given.method, resamples=given.resamples)
    shares = {} if given.difference else {"mean": 1.0}
    print(f"| prompts | {' | '.join(f'rate {rate:g}' for rate in given.rates)} |")
    print(f"|---|{'---|' * len(given.rates)}")
    for prompts in given.prompts:
        cells = []
        for rate in given.rates:
            rng = np.random.default_rng((prompts, round(1000 * rate)))
            held, width = coverage(
                rng, bootstrap, shares, given.trials, prompts, given.images, rate, given.alike
            )
            cells.append(f"{100 * held:.1f} ({100 * width:.0f})")
        print(f"| {prompts} | {' | '.join(cells)} |", flush=True)
    print(
        f"\nPercent of {given.trials:,} intervals that hold the rate (mean width in points); of a "
        f"{'difference' if given.difference else 'share'}, method {given.method}, {given.images} "
        f"images a prompt, correlation {given.alike:g}."
    )


if __name__ == "__main__":
    main()
