"""Whether what `compare` says of many models, and of a larger comparison, comes true.

    python scripts/comparison_coverage.py pairs    # intervals and stars of tables of all pairs
    python scripts/comparison_coverage.py power    # the number of prompts that it says are needed
    python scripts/comparison_coverage.py looks    # what looking again does to an interval

Models have a skill, prompts favour one model or another, and images scatter; scores are rounded to
steps, which makes ties. Of a prompt's images the latent differences have a correlation of --alike.
Tables of pairs go through `compare_scores` as `diffalign compare` calls it, with fewer resamples.
"""

from __future__ import annotations

import argparse
import itertools
import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from diffalign.comparison.compare import Place, compare_scores
from diffalign.evidence import POWER, holm, looks_at, prompts_needed

SKILLS = (0.0, 0.0, 0.8, 2.5)
"""Of the models of a table; their pairs have win rates of decided pairs from .5 to .97."""
STEP = 0.5
"""Scores are rounded to multiples of it."""
PROMPTS = (5, 10, 20, 36, 100)
MANY = 60_000
"""Prompts by which true rates are known."""


def scores(
    rng: np.random.Generator, skills: NDArray[np.float64], prompts: int, images: int, alike: float
) -> NDArray[np.float64]:
    """Scores of shape [models, prompts, images]."""
    shape = (len(skills), prompts, images)
    favour = rng.normal(0, math.sqrt(alike), (*shape[:2], 1))
    latent = skills[:, None, None] + favour + rng.normal(0, math.sqrt(1 - alike), shape)
    return np.round(latent / STEP) * STEP


def decided_rate(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Wins of the second among decided pairs."""
    wins, losses = (second > first).sum(), (second < first).sum()
    return float(wins / (wins + losses))


def by_place(values: NDArray[np.float64]) -> dict[Place, float]:
    return {(str(p), s): float(v) for (p, s), v in np.ndenumerate(values)}


def pairs(given: argparse.Namespace) -> None:
    """Coverage of every pair's interval, by its true rate, and tables with a wrong star."""
    rng = np.random.default_rng(0)
    skills = np.array(SKILLS)
    known = scores(rng, skills, MANY, 1, given.alike)
    truth = {pair: decided_rate(*known[list(pair)]) for pair in itertools.combinations(range(4), 2)}
    rates = sorted({round(rate, 2) for rate in truth.values()})
    titles = [f"rate {rate:.2f}" for rate in rates]
    print(f"| prompts | {' | '.join(titles)} | all pairs | ties | a wrong star | if all alike |")
    print(f"|---|{'---|' * (len(rates) + 4)}")
    for prompts in given.prompts:
        held: dict[float, list[bool]] = {rate: [] for rate in rates}
        ties, wrong, wrong_alike = [], [], []
        for _ in range(given.trials):
            table = table_of(rng, skills, prompts, given)
            for pair, found in table.items():
                interval, rate = found.win_rate_interval, truth[pair]
                if interval is not None:
                    held[round(rate, 2)].append(interval.low <= rate <= interval.high)
                ties.append(found.ties / found.items)
            corrected = holm([found.p_value for found in table.values()])
            alike = [round(truth[pair], 2) == 0.5 for pair in table]
            wrong.append(any(p < 0.05 and a for p, a in zip(corrected, alike, strict=True)))
            same = table_of(rng, 0 * skills, prompts, given, intervals=False)
            wrong_alike.append(min(holm([found.p_value for found in same.values()])) < 0.05)
        cells = [f"{100 * np.mean(held[rate]):.1f}" for rate in rates]
        every = [hit for hits in held.values() for hit in hits]
        print(
            f"| {prompts} | {' | '.join(cells)} | {100 * np.mean(every):.1f} "
            f"| {100 * np.mean(ties):.0f} | {100 * np.mean(wrong):.1f} "
            f"| {100 * np.mean(wrong_alike):.1f} |",
            flush=True,
        )
    print(
        f"\nPercent of the 95 % intervals of {given.trials:,} tables of four models that hold the "
        f"rate; of ties; of tables with a star at a pair that is alike, by skill "
        f"({', '.join(map(str, SKILLS))}) and where all models are; {given.images} images a "
        f"prompt, correlation {given.alike:g}."
    )


def table_of(rng, skills, prompts, given, *, intervals=True):
    made = scores(rng, skills, prompts, given.images, given.alike)
    columns = [by_place(values) for values in made]
    return {
        (a, b): compare_scores(columns[a], columns[b], resamples=300 if intervals else 100)
        for a, b in itertools.combinations(range(len(skills)), 2)
    }


def power(given: argparse.Namespace) -> None:
    """The number of prompts that the report names, next to the one that is needed."""
    rng = np.random.default_rng(1)
    print("| correlation | images | ties | needed | said of many prompts | of 100 | of 36 |")
    print("|---|---|---|---|---|---|---|")
    for alike, images, step in ((0.0, 1, 0.01), (0.1, 4, 0.5), (0.3, 4, 0.5), (0.5, 9, 1.0)):
        skill = skill_of(rng, given.samples, step, given.rate)

        def net(prompts: int, skill=skill, alike=alike, images=images, step=step):
            favour = rng.normal(0, math.sqrt(2 * alike), (prompts, 1))
            latent = rng.normal(0, math.sqrt(2 * (1 - alike)), (prompts, images))
            difference = np.round((skill + favour + latent) / step)
            return (difference > 0).sum(axis=1) * 1.0, (difference < 0).sum(axis=1) * 1.0

        many = net(given.many)
        said = prompts_needed(*many, rate=given.rate)
        assert said is not None
        ties = 1 - (many[0] + many[1]).mean() / images
        needed = needed_by_simulation(net, said.prompts, given.trials)
        cells = []
        for prompts in (100, 36):
            found = [prompts_needed(*net(prompts), rate=given.rate) for _ in range(200)]
            numbers = [each.prompts for each in found if each is not None]
            low, middle, high = np.quantile(numbers, [0.1, 0.5, 0.9])
            cells.append(f"{middle:.0f} ({low:.0f} to {high:.0f})")
        print(
            f"| {alike:g} | {images} | {100 * ties:.0f} % | {needed:.0f} | {said.prompts} "
            f"({said.prompts / needed - 1:+.0%}) | {' | '.join(cells)} |",
            flush=True,
        )
    print(
        f"\nPrompts of which {POWER:.0%} of comparisons show a win rate of {given.rate:g} at p < "
        f"0.05: by {given.trials:,} simulations at each of five sizes, as the report says it from "
        f"{given.many:,} prompts, and from 100 and 36 (median, tenth and ninetieth percentile of "
        f"200 reports)."
    )


def skill_of(rng: np.random.Generator, samples: int, step: float, rate: float) -> float:
    """The mean latent difference whose decided pairs are won at a rate."""
    noise = rng.normal(0, math.sqrt(2), samples)
    low, high = 0.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        difference = np.round((middle + noise) / step)
        wins, losses = (difference > 0).sum(), (difference < 0).sum()
        low, high = (middle, high) if wins / (wins + losses) < rate else (low, middle)
    return middle


def needed_by_simulation(net, near: int, trials: int) -> float:
    """Prompts at which the test of flipped signs, in its normal limit, has the power."""
    sizes = [round(near * share) for share in (0.7, 0.85, 1.0, 1.15, 1.3)]
    shown = []
    for size in sizes:
        hits = 0
        for _ in range(trials):
            wins, losses = net(size)
            total = (wins - losses).sum()
            hits += abs(total) > norm.ppf(0.975) * math.sqrt(((wins - losses) ** 2).sum())
        shown.append(norm.ppf(hits / trials))
    slope, offset = np.polyfit(np.sqrt(sizes), shown, 1)
    return float(((norm.ppf(POWER) - offset) / slope) ** 2)


def looks(given: argparse.Namespace) -> None:
    """How often all intervals hold, of comparisons that are looked at as they grow."""
    rng = np.random.default_rng(2)
    print("| looks at | promised for all | held | with the named confidence |")
    print("|---|---|---|---|")
    for sizes in ((100, 200), (100, 200, 300, 400, 500), (200, 220, 240), (50, 400)):
        said = looks_at(sizes)
        assert said is not None
        wider = norm.ppf((1 + said.needed) / 2)
        held, held_wider = 0, 0
        for _ in range(given.trials):
            total = np.cumsum(rng.normal(size=sizes[-1]))[np.array(sizes) - 1] / np.sqrt(sizes)
            held += bool((abs(total) < norm.ppf(0.975)).all())
            held_wider += bool((abs(total) < wider).all())
        print(
            f"| {', '.join(map(str, sizes))} | {said.held:.1%} | {held / given.trials:.1%} "
            f"| {said.needed:.3f}: {held_wider / given.trials:.1%} |",
            flush=True,
        )
    print(f"\n{given.trials:,} simulated comparisons a row.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("pairs", "power", "looks"))
    parser.add_argument("--trials", type=int, default=1000, help="tables, or simulations a size")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    parser.add_argument("--images", type=int, default=4, help="of each prompt, in tables")
    parser.add_argument("--alike", type=float, default=0.1, help="correlation within a prompt")
    parser.add_argument("--rate", type=float, default=0.55, help="the win rate to see")
    parser.add_argument("--many", type=int, default=20_000, help="prompts that tell clustering")
    parser.add_argument("--samples", type=int, default=2_000_000, help="by which skills are found")
    given = parser.parse_args()
    {"pairs": pairs, "power": power, "looks": looks}[given.what](given)


if __name__ == "__main__":
    main()
