"""How often intervals of a win rate, and of a difference of scores, hold the truth.

    python scripts/interval_coverage.py                        # of docs/evaluate-images.md
    python scripts/interval_coverage.py --method percentile    # the same of scipy's percentiles
    python scripts/interval_coverage.py --of difference --rates 0.05    # of a mean that is no share
    python scripts/interval_coverage.py --of skewed            # log-normal scores, one column

Prompts differ: the chance of winning is sampled for each from a beta distribution, so that the
images of one prompt agree with a correlation of --alike. Every cell simulates --trials comparisons
of --images images a prompt. Of differences a win is one of 1, all else one of 0, and the mean has
the interval of any figure that is no share; where no image differs there is no interval, and the
share of such comparisons stands in square brackets. Skewed scores are exp of a normal prompt's
effect (deviation .5) plus an image's (.8).
"""

from __future__ import annotations

import argparse
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from diffalign.intervals import Bootstrap, Method, Tally, ratio

PROMPTS = (5, 10, 20, 36, 100)
RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97)
PROMPT_DEVIATION, IMAGE_DEVIATION = 0.5, 0.8


def mean(tally: Tally) -> NDArray[np.float64]:
    return ratio(tally["sum"], tally["items"])


def wins(rng: np.random.Generator, prompts: int, images: int, rate: float, alike: float) -> Tally:
    """Wins of each prompt, out of its images."""
    weight = (1 - alike) / alike if alike else np.inf
    chance = rng.beta(rate * weight, (1 - rate) * weight, prompts) if alike else rate
    won = rng.binomial(images, chance, prompts)
    return {"sum": won.astype(float), "items": np.full(prompts, float(images))}


def skewed(rng: np.random.Generator, prompts: int, images: int) -> Tally:
    """Sums of log-normal scores of each prompt."""
    effects = rng.normal(0, PROMPT_DEVIATION, (prompts, 1))
    scores = np.exp(effects + rng.normal(0, IMAGE_DEVIATION, (prompts, images)))
    return {"sum": scores.sum(axis=1), "items": np.full(prompts, float(images))}


def coverage(
    rng: np.random.Generator,
    bootstrap: Bootstrap,
    of: str,
    trials: int,
    prompts: int,
    images: int,
    rate: float,
    alike: float,
) -> tuple[float, float, float]:
    """Share of intervals that hold the truth, their mean width, and comparisons without one."""
    held, width, given = 0, 0.0, 0
    truth = np.exp((PROMPT_DEVIATION**2 + IMAGE_DEVIATION**2) / 2) if of == "skewed" else rate
    for _ in range(trials):
        if of == "skewed":
            tally = skewed(rng, prompts, images)
        else:
            tally = wins(rng, prompts, images, rate, alike)
        shares = {"mean": 1.0} if of == "share" else None
        found = bootstrap.intervals(tally, {"mean": mean}, shares)["mean"]
        if found is not None:
            given += 1
            held += found.low - 1e-12 <= truth <= found.high + 1e-12
            width += found.high - found.low
    return held / max(given, 1), width / max(given, 1), 1 - given / trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=get_args(Method), default="auto")
    parser.add_argument("--of", choices=("share", "difference", "skewed"), default="share")
    parser.add_argument("--trials", type=int, default=1000, help="comparisons a cell")
    parser.add_argument("--resamples", type=int, default=300)
    parser.add_argument("--images", type=int, default=5, help="of each prompt")
    parser.add_argument("--alike", type=float, default=0.1, help="correlation within a prompt")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    given = parser.parse_args()
    bootstrap = Bootstrap(method=given.method, resamples=given.resamples)
    rates = [0.5] if given.of == "skewed" else given.rates
    titles = ["skewed scores"] if given.of == "skewed" else [f"rate {rate:g}" for rate in rates]
    print(f"| prompts | {' | '.join(titles)} |")
    print(f"|---|{'---|' * len(titles)}")
    for prompts in given.prompts:
        cells = []
        for rate in rates:
            rng = np.random.default_rng((prompts, round(1000 * rate)))
            held, width, none = coverage(
                rng, bootstrap, given.of, given.trials, prompts, given.images, rate, given.alike
            )
            without = f" [{100 * none:.0f}]" if none else ""
            cells.append(f"{100 * held:.1f} ({100 * width:.0f}){without}")
        print(f"| {prompts} | {' | '.join(cells)} |", flush=True)
    named = {"share": "share", "difference": "difference", "skewed": "mean of skewed scores"}
    print(
        f"\nPercent of the intervals of {given.trials:,} comparisons that hold the truth (mean "
        f"width in points) [percent without an interval]; of a {named[given.of]}, method "
        f"{given.method}, {given.images} images a prompt, correlation {given.alike:g}."
    )


if __name__ == "__main__":
    main()
