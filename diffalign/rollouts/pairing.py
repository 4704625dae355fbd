"""Which of the images of one prompt are preferred to which others, and the grid that shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from diffalign.data.pairs.groups import pareto_fronts
from diffalign.data.strength.gap import sigmoid
from diffalign.files import write_image, writing
from diffalign.imaging.grid import GridCell, GridRow, evenly_spaced_with_ends, render_grid
from diffalign.imaging.image_files import read_image
from diffalign.ranges import MoreThan

PairRule = Literal["all", "best_worst", "fronts"]
"""Which decided pairs of a prompt are trained on: all; one, of the image that wins against most
others and the one that loses against most; or those of an image that none beats and one that beats
none, as CaPO takes them (arXiv:2502.02588)."""

Scores = Sequence[float]
"""Of one image, under each scorer in the same order; finite, higher is better."""


@dataclass(frozen=True)
class Pairing:
    """The verdict on all pairs of images of one prompt."""

    decided: tuple[tuple[int, int], ...]
    """Preferred image, other image."""
    tied: int
    """Pairs that are equal under every scorer."""
    incomparable: int
    """Pairs in which each side is better under some scorer."""
    fronts: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
    """The images that none beats, and those that beat none."""


def pair_up(scores: Mapping[int, Scores]) -> Pairing:
    """Compare every image with every other.

    A side wins if it is at least as good under every scorer and better under one.

    Args:
        scores: of the images, by their number.
    """
    decided, tied, incomparable = [], 0, 0
    for first, second in combinations(sorted(scores), 2):
        verdicts = {_sign(a - b) for a, b in zip(scores[first], scores[second], strict=True)} - {0}
        if not verdicts:
            tied += 1
        elif len(verdicts) == 2:
            incomparable += 1
        else:
            decided.append((first, second) if verdicts == {1} else (second, first))
    images = sorted(scores)
    best, worst = pareto_fronts([scores[image] for image in images])
    fronts = (frozenset(images[i] for i in best), frozenset(images[i] for i in worst))
    return Pairing(tuple(decided), tied, incomparable, fronts)


Temperature = Annotated[float, MoreThan(0)] | None
"""Of preferences: the gap of scores at which the odds are e to 1; None where the better score is
the better image for certain."""


def preference_of(gap: float, temperature: Temperature) -> float | None:
    """Probability that a side is preferred whose score is larger by a gap; None for certainly."""
    return None if temperature is None else sigmoid(gap / temperature)


def strength_of(temperature: Temperature, weight: Weighting = "alike") -> dict[str, str]:
    """The parts of a pair's strength that settings make, and the setting that asks for each."""
    found = {} if temperature is None else {"preference": f"temperature is {temperature:g}"}
    return found if weight == "alike" else {**found, "weight": f"weight is {weight}"}


Weighting = Literal["alike", "certainty"]
"""How much the pairs of a round count: all alike, or by one over the standard deviation of the gap
of their scores (Ctrl-U, Zhang et al. 2024, arXiv:2410.11236)."""
_SUREST = 10.0
"""By how much the deviation of a pair may be below the mean of its round and still count."""


def certainty_weights(deviations: Sequence[float]) -> list[float]:
    """Weights of the pairs of a round: one over the deviation, and 1 on average.

    A deviation below a tenth of the mean counts as that, so that no pair is the whole round.

    Args:
        deviations: of the gaps of scores, at least 0 each.
    """
    if not deviations or not any(deviations):
        return [1.0] * len(deviations)
    least = sum(deviations) / len(deviations) / _SUREST
    raw = [1 / max(each, least) for each in deviations]
    mean = sum(raw) / len(raw)
    return [each / mean for each in raw]


def mean_gap(chosen: Scores, rejected: Scores) -> float:
    """Mean over the scorers of how much better the chosen image is, the strength of the preference
    (Wang et al. 2024, arXiv:2401.06080)."""
    return sum(a - b for a, b in zip(chosen, rejected, strict=True)) / len(chosen)


def from_best_to_worst(pairing: Pairing, images: Sequence[int]) -> list[int]:
    """The images by how many pairs they win less those they lose; equal ones as they were."""
    balance = dict.fromkeys(images, 0)
    for winner, loser in pairing.decided:
        balance[winner] += 1
        balance[loser] -= 1
    return sorted(images, key=lambda image: -balance[image])


def chosen_pairs(pairing: Pairing, rule: PairRule) -> tuple[tuple[int, int], ...]:
    """The decided pairs that are trained on; with `best_worst`, one or none."""
    if rule == "all" or not pairing.decided:
        return pairing.decided
    if rule == "fronts":
        best, worst = pairing.fronts
        return tuple(pair for pair in pairing.decided if pair[0] in best and pair[1] in worst)
    ranked = from_best_to_worst(pairing, sorted({i for pair in pairing.decided for i in pair}))
    extremes = (ranked[0], ranked[-1])
    return tuple(pair for pair in pairing.decided if pair == extremes)


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)


_MOST_ROWS = 6
_MOST_COLUMNS = 6


@dataclass(frozen=True)
class RankedGroup:
    """The images of one prompt, from best to worst."""

    prompt: str
    files: Sequence[Path]
    """Images; absent ones are shown as missing."""
    scores: Sequence[float | None]
    """Written under them."""


def render_ranked_grid(path: Path, groups: Sequence[RankedGroup], *, title: str) -> None:
    """Render evenly spaced ones of the groups.

    Args:
        path: of the PNG to write.
        groups: at least one, each with the same number of images.
        title: above everything.
    """
    count = len(groups[0].files)
    ranks = evenly_spaced_with_ends(range(count), _MOST_COLUMNS)
    rows = [
        GridRow(
            caption=group.prompt,
            cells=[_cell(group.files[rank], group.scores[rank]) for rank in ranks],
        )
        for group in evenly_spaced_with_ends(groups, _MOST_ROWS)
    ]
    titles = [{0: "best", count - 1: "worst"}.get(rank, str(rank + 1)) for rank in ranks]
    with writing(path):
        write_image(path, render_grid(rows, titles, title=title))


def _cell(file: Path, score: float | None) -> GridCell | None:
    if not file.exists():
        return None
    return GridCell(image=read_image(file), score=score)
