"""Two models compared by their scores, and how sure one can be of the better one.

Images are paired by prompt and seed, so both models answered the same prompt from the same
noise. Images of one prompt resemble each other and are no independent evidence: intervals come
from resampling whole prompts, see `diffalign.intervals`, and p-values from flipping them, see
`diffalign.evidence`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.evidence import PromptsNeeded, prompts_needed, sign_flip_p_value
from diffalign.intervals import Bootstrap, Interval, Tally, ratio

Place = tuple[str, int]
"""Prompt id and seed."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One model against the baseline, by one scorer."""

    prompts: int
    """Clusters that are resampled."""
    items: int
    """Pairs of images."""
    wins: int
    """Pairs that the model wins."""
    ties: int
    losses: int
    win_rate: float | None
    """Wins among decided pairs, 0 to 1; None where every pair is a tie."""
    win_rate_interval: Interval | None
    win_rate_ties_half: float
    """Wins among all pairs, a tie counted as half a win."""
    win_rate_ties_half_interval: Interval | None
    baseline_mean: float
    """Mean score over the pairs."""
    model_mean: float
    mean_difference: float
    """Model minus baseline."""
    mean_difference_interval: Interval | None
    missing_baseline: tuple[Place, ...]
    """Left out of everything above: the baseline has no score for them."""
    missing_model: tuple[Place, ...]
    """Left out likewise: the model has no score for them."""
    p_value: float
    """Of "neither model is better", two-sided, by flipping whole prompts."""
    needed: PromptsNeeded | None
    """Prompts of a comparison that would show the win rate that was asked about."""
    confidence: float
    """Of the intervals."""
    notes: tuple[str, ...]
    """Cautions for whoever quotes the numbers."""


def compare_scores(
    baseline: Mapping[Place, float],
    model: Mapping[Place, float],
    *,
    expected: Iterable[Place] = (),
    tie_tolerance: float = 0.0,
    rate_to_see: float = 0.55,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two models on the places that both have a score for.

    Args:
        baseline: score by (prompt id, seed).
        model: likewise.
        expected: places that should have scores; one that neither model has is missing from both.
        tie_tolerance: scores that differ by at most this much are a tie.
        rate_to_see: the win rate that a larger comparison would have to show, not 0.5.
        confidence: of the intervals, between 0 and 1.
        resamples: how often prompts are sampled with replacement.
        seed: of the resampling.

    Raises:
        ValueError: no place has scores of both models, or a score is not finite.
    """
    places = sorted({*baseline, *model, *expected})
    paired = [place for place in places if place in baseline and place in model]
    if not paired:
        raise ValueError("no prompt and seed has scores of both models, so nothing can be compared")
    before = np.array([baseline[place] for place in paired])
    after = np.array([model[place] for place in paired])
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("a score is not finite; such images must be left out before comparing")

    difference = after - before
    wins, losses = difference > tie_tolerance, difference < -tie_tolerance
    ties = ~(wins | losses)
    tally = _sums_by_prompt(
        [prompt for prompt, _ in paired],
        {
            "wins": wins,
            "losses": losses,
            "ties": ties,
            "difference": difference,
            "items": np.ones_like(difference),
        },
    )
    counts = {name: np.asarray(sums.sum()) for name, sums in tally.items()}
    bootstrap = Bootstrap(confidence=confidence, resamples=resamples, seed=seed)
    intervals = bootstrap.intervals(
        tally,
        {"win_rate": _win_rate, "ties_half": _ties_half, "difference": _mean_difference},
        shares={"win_rate": 1.0, "ties_half": 1.0},
    )
    prompts = len(tally["items"])
    decided_prompts = int((tally["wins"] + tally["losses"] > 0).sum())

    return Comparison(
        prompts=prompts,
        items=len(paired),
        wins=int(wins.sum()),
        ties=int(ties.sum()),
        losses=int(losses.sum()),
        win_rate=None if decided_prompts == 0 else float(_win_rate(counts)),
        win_rate_interval=intervals["win_rate"],
        win_rate_ties_half=float(_ties_half(counts)),
        win_rate_ties_half_interval=intervals["ties_half"],
        baseline_mean=float(before.mean()),
        model_mean=float(after.mean()),
        mean_difference=float(difference.mean()),
        mean_difference_interval=intervals["difference"],
        missing_baseline=tuple(place for place in places if place not in baseline),
        missing_model=tuple(place for place in places if place not in model),
        p_value=sign_flip_p_value(tally["wins"] - tally["losses"], seed=seed),
        needed=prompts_needed(
            tally["wins"], tally["losses"], rate=rate_to_see, confidence=confidence
        ),
        confidence=confidence,
        notes=(
            *_notes(prompts, decided_prompts, int(wins.sum()), int(losses.sum())),
            *(_same_everywhere(prompts, intervals["difference"], confidence)),
            *(bootstrap.cautions(prompts, "prompts") if prompts > 1 else ()),
        ),
    )


def _sums_by_prompt(prompts: list[str], values: Mapping[str, NDArray[Any]]) -> Tally:
    """Sum the rows [items] of each prompt: [prompts]."""
    _, cluster = np.unique(prompts, return_inverse=True)
    return {
        name: np.asarray(np.bincount(cluster, weights=rows), dtype=np.float64)
        for name, rows in values.items()
    }


def _win_rate(sums: Tally) -> NDArray[np.float64]:
    """Among decided pairs; not a number where there are none."""
    return ratio(sums["wins"], sums["wins"] + sums["losses"])


def _ties_half(sums: Tally) -> NDArray[np.float64]:
    return ratio(sums["wins"] + sums["ties"] / 2, sums["items"])


def _mean_difference(sums: Tally) -> NDArray[np.float64]:
    return ratio(sums["difference"], sums["items"])


def _same_everywhere(prompts: int, interval: Interval | None, confidence: float) -> tuple[str, ...]:
    """A note where all prompts have the same mean difference, most often none."""
    if prompts < 2 or interval is not None:
        return ()
    others = 1 - (1 - confidence) ** (1 / prompts)
    return (
        f"All prompts have the same difference of scores, so its mean has no interval: how large "
        f"those are that {prompts} prompts do not show, nothing tells. At {confidence:.0%} fewer "
        f"than {others:.0%} of all prompts have another.",
    )


def _notes(prompts: int, decided_prompts: int, wins: int, losses: int) -> tuple[str, ...]:
    notes = []
    if decided_prompts == 0:
        notes.append("Every pair is a tie, so the win rate among decided pairs is undefined.")
    elif prompts == 1:
        notes.append(
            "There is one prompt only, so no interval can be given: intervals come from "
            "differences between prompts."
        )
    elif decided_prompts == 1:
        notes.append(
            "All decided pairs belong to one prompt, so the win rate has no interval: intervals "
            "come from differences between prompts."
        )
    elif wins == 0 or losses == 0:
        notes.append(
            f"All decided pairs went one way: the interval of the win rate takes each of the "
            f"{decided_prompts} prompts that decide as one trial."
        )
    return tuple(notes)


def contradiction(model: str, baseline: str, by_scorer: Mapping[str, Comparison]) -> str | None:
    """A sentence where a model is better by one scorer and worse by another, both beyond their
    intervals: how one looks that was trained on the former (reward hacking)."""

    def listed(sign: int) -> str:
        found = {
            name: c.mean_difference
            for name, c in by_scorer.items()
            if c.mean_difference_interval is not None
            and min(sign * end for end in c.mean_difference_interval) > 0
        }
        return " and ".join(f"{name} ({value:+.3g})" for name, value in found.items())

    better, worse = listed(1), listed(-1)
    if not better or not worse:
        return None
    return (
        f"{model} is better than {baseline} by {better} and worse by {worse}. Where it was trained "
        f"on one of the former, that is how reward hacking looks, and harm where the latter "
        f"measure something that you want: look at the images, take an earlier checkpoint, or "
        f"train with a larger beta, a lower learning rate, or on both scores"
    )
