"""Comparisons as the sections of a report: numbers first, then what they look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffalign.comparison.compare import Interval, Place
from diffalign.comparison.page import (
    Html,
    Section,
    Tile,
    image_cards,
    image_grid,
    interval_bar,
    notes,
    paragraph,
    share_bar,
    table,
    tiles,
)
from diffalign.comparison.results import Result, number_interval, percent, percent_interval
from diffalign.generation.chosen_images import grid_rows
from diffalign.generation.manifest import ItemKey, ManifestRow
from diffalign.imaging.grid import GridRow


def numbers_section(results: Sequence[Result]) -> Section:
    """Win rates and mean scores: large for one result, a table for several."""
    shown = _tiles(results[0]) if len(results) == 1 else _table(results)
    warnings = [
        f"{result.model} by {result.scorer}: {line}"
        for result in results
        for line in result.warnings
    ]
    explanation = paragraph(
        "The win rate is the share of won pairs among those that are not tied. Intervals resample "
        "whole prompts, since images of one prompt resemble each other; the dashed mark is "
        "where neither side is better."
    )
    return Section("Result", shown, notes(warnings), explanation)


def grid_section(rows: Sequence[GridRow], models: Sequence[str]) -> Section:
    """Prompts down, models across."""
    return Section("Same prompt, same noise", image_grid(rows, models))


def gallery_sections(
    result: Result,
    folder: Path,
    rows: Mapping[ItemKey, ManifestRow],
    scores: Mapping[ItemKey, float],
    *,
    count: int,
    tie_tolerance: float,
) -> list[Section]:
    """The pairs whose scores differ most, in both directions, one per prompt while there are
    enough prompts.

    Args:
        result: whose sides are shown.
        folder: of the manifest.
        rows: the manifest.
        scores: by model, prompt id and seed.
        count: pairs in each direction.
        tie_tolerance: smaller differences are no win.
    """
    sides = (result.baseline, result.model)
    gains: dict[Place, float] = {
        (prompt, seed): scores[result.model, prompt, seed] - score
        for (model, prompt, seed), score in scores.items()
        if model == result.baseline and (result.model, prompt, seed) in scores
    }
    wins = _largest({place: g for place, g in gains.items() if g > tie_tolerance}, count)
    losses = _largest({place: -g for place, g in gains.items() if g < -tie_tolerance}, count)
    return [
        Section(title, image_cards(grid_rows(folder, rows, sides, places, scores), sides))
        for title, places in (
            (f"Biggest wins of {result.model}", wins),
            (f"Biggest losses of {result.model}", losses),
        )
        if places
    ]


def _largest(gains: Mapping[Place, float], count: int) -> list[Place]:
    ordered = sorted(gains, key=lambda place: (-gains[place], place))
    best: dict[str, Place] = {}
    for place in ordered:
        best.setdefault(place[0], place)
    rest = [place for place in ordered if best[place[0]] != place]
    return [*best.values(), *rest][:count]


def _tiles(result: Result) -> Html:
    c = result.comparison
    return tiles(
        [
            Tile(
                "Win rate of decided pairs",
                percent(c.win_rate),
                Html(
                    _rate_bar(c.win_rate, c.win_rate_interval)
                    + f"{result.level}: {percent_interval(c.win_rate_interval)}"
                ),
            ),
            Tile(
                f"Mean score by {result.scorer}",
                f"{c.baseline_mean:.3f} \N{RIGHTWARDS ARROW} {c.model_mean:.3f}",
                Html(
                    _difference_bar(
                        c.mean_difference, c.mean_difference_interval, _spread([result])
                    )
                    + f"{c.mean_difference:+.3f}, {result.level}: "
                    + number_interval(c.mean_difference_interval)
                ),
            ),
            Tile(
                f"Won, tied, lost: {c.items} pairs, {c.prompts} prompts",
                f"{c.wins} \N{MIDDLE DOT} {c.ties} \N{MIDDLE DOT} {c.losses}",
                Html(
                    share_bar({"won": c.wins, "tied": c.ties, "lost": c.losses})
                    + f"with ties as half: {percent(c.win_rate_ties_half)}"
                ),
            ),
        ]
    )


def _table(results: Sequence[Result]) -> Html:
    spread = _spread(results)
    rows: list[list[str | Html]] = []
    for result in results:
        c = result.comparison
        rows.append(
            [
                result.model,
                result.scorer,
                share_bar({"won": c.wins, "tied": c.ties, "lost": c.losses}),
                percent(c.win_rate),
                _with_text(
                    _rate_bar(c.win_rate, c.win_rate_interval),
                    percent_interval(c.win_rate_interval),
                ),
                f"{c.baseline_mean:.3f} \N{RIGHTWARDS ARROW} {c.model_mean:.3f}",
                _with_text(
                    _difference_bar(c.mean_difference, c.mean_difference_interval, spread),
                    number_interval(c.mean_difference_interval),
                ),
            ]
        )
    level = results[0].level
    return table(
        ["model", "scorer", "pairs", "win rate", level, "mean score", f"difference, {level}"], rows
    )


def _with_text(bar: Html, text: str) -> Html:
    return Html(f"{bar}<small>{text}</small>")


def _spread(results: Sequence[Result]) -> float:
    """Half the width of an axis that holds every difference and its interval."""
    ends = [
        abs(end)
        for result in results
        for end in (
            result.comparison.mean_difference,
            *(result.comparison.mean_difference_interval or ()),
        )
    ]
    return 1.2 * max(ends) or 1.0


def _rate_bar(value: float | None, interval: Interval | None) -> Html:
    if value is None or interval is None:
        return Html("")
    return interval_bar(value, interval.low, interval.high)


def _difference_bar(value: float, interval: Interval | None, spread: float) -> Html:
    if interval is None:
        return Html("")
    return interval_bar(
        value, interval.low, interval.high, minimum=-spread, maximum=spread, neutral=0.0
    )
