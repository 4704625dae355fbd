"""Results of comparisons for a console, as Markdown, as JSON, and as sections of a page."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from diffalign.comparison.compare import Comparison, Place
from diffalign.comparison.results import Result, contradictions
from diffalign.evidence import PromptsNeeded
from diffalign.files import to_json
from diffalign.generation.manifest import ItemKey, ManifestRow, grid_rows
from diffalign.imaging.grid import GridRow
from diffalign.intervals import Interval
from diffalign.pages.parts import (
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


def percent(value: float | None) -> str:
    """A rate."""
    return "undefined" if value is None else f"{value:.1%}"


def percent_interval(interval: Interval | None) -> str:
    """The interval of a rate."""
    return "no interval" if interval is None else f"{interval.low:.1%} to {interval.high:.1%}"


def number_interval(interval: Interval | None) -> str:
    """The interval of a difference."""
    return "no interval" if interval is None else f"{interval.low:+.3f} to {interval.high:+.3f}"


def p_text(value: float) -> str:
    """A p-value."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def console_table(result: Result) -> Table:
    """One result, narrow enough for 80 columns."""
    c = result.comparison
    table = Table(
        title=f"{result.model} against {result.baseline} by {escape(result.scorer)}: "
        f"{c.items} pairs, {c.prompts} prompts",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    for heading in ("", "value", result.level):
        table.add_column(heading)
    table.add_row("won, tied, lost", f"{c.wins}, {c.ties}, {c.losses}", "")
    table.add_row(
        "win rate of decided pairs", percent(c.win_rate), percent_interval(c.win_rate_interval)
    )
    table.add_row(
        "win rate, ties as half",
        percent(c.win_rate_ties_half),
        percent_interval(c.win_rate_ties_half_interval),
    )
    table.add_row(
        "mean score",
        f"{c.baseline_mean:.3f} -> {c.model_mean:.3f} ({c.mean_difference:+.3f})",
        number_interval(c.mean_difference_interval),
    )
    corrected = "" if result.holm is None else f"{p_text(result.holm)} among all comparisons"
    table.add_row("p-value of no difference", p_text(c.p_value), corrected)
    return table


def as_json(
    results: Sequence[Result], settings: Mapping[str, Any], pairs: Sequence[Result] = ()
) -> str:
    """Everything at full precision; intervals as `low` and `high`, or null.

    Args:
        results: against the baseline.
        settings: of the comparison, and other figures.
        pairs: of the other models among themselves.
    """
    content = {
        **settings,
        "contradictions": contradictions(results),
        "comparisons": [_plain(result) for result in results],
        "pairs": [_plain(result) for result in pairs],
    }
    return to_json(content, indent=2) + "\n"


def _plain(result: Result) -> dict[str, Any]:
    return {
        "scorer": result.scorer,
        "baseline": result.baseline,
        "model": result.model,
        **_plain_comparison(result.comparison),
        "holm": result.holm,
        "looks": [result.comparison.items] if result.looks is None else list(result.looks.pairs),
        "held_at_all_looks": None if result.looks is None else result.looks.held,
        "categories": [
            {"kind": each.kind, "category": each.category, **_plain_comparison(each.comparison)}
            for each in result.categories
        ],
    }


def _plain_comparison(comparison: Comparison) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Interval):
            return value._asdict()
        return asdict(value) if isinstance(value, PromptsNeeded) else value

    return {name: plain(value) for name, value in vars(comparison).items()}


def markdown_text(text: str) -> str:
    """Text from a name, a prompt or a message for one line of markdown: shown, never obeyed."""
    plain = " ".join(text.split())
    return _MARKUP.sub(r"\\\g<0>", plain).replace("<", "&lt;").replace(">", "&gt;")


_MARKUP = re.compile(r"[\\`*_{}\[\]|#!~]|(?<=[A-Za-z])://|&(?=#?\w+;)")
"""Characters that markdown would take for emphasis, code, links, tables, headings or entities; and
the middle of an address, which many readers turn into a link by themselves."""


def as_markdown(results: Sequence[Result], grid: str, more: Sequence[str] = ()) -> str:
    """A table with its cautions, further tables, and the grid.

    Args:
        results: at least one.
        grid: the grid's file, relative to the page.
        more: lines of further tables.
    """
    first = results[0]
    lines = [
        f"| model against {markdown_text(first.baseline)} | scorer "
        f"| pairs (prompts) | won / tied / lost "
        f"| win rate of decided pairs ({first.level}) | ties as half | mean score "
        f"| difference ({first.level}) | p{'' if first.holm is None else ', corrected'} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        c = result.comparison
        lines.append(
            f"| {markdown_text(result.model)} | {markdown_text(result.scorer)} "
            f"| {c.items} ({c.prompts}) "
            f"| {c.wins} / {c.ties} / {c.losses} "
            f"| {percent(c.win_rate)} ({percent_interval(c.win_rate_interval)}) "
            f"| {percent(c.win_rate_ties_half)} | {c.baseline_mean:.3f} -> {c.model_mean:.3f} "
            f"| {c.mean_difference:+.3f} ({number_interval(c.mean_difference_interval)}) "
            f"| {p_text(result.p_value)} |"
        )
    warnings = [
        f"- {markdown_text(f'{result.model} by {result.scorer}: {line}')}"
        for result in results
        for line in result.warnings
    ]
    warnings += [f"- {markdown_text(line)}" for line in contradictions(results)]
    plans = [
        f"- {markdown_text(f'{result.model} by {result.scorer}: {result.plan}')}"
        for result in results
        if result.plan is not None
    ]
    for listed in (warnings, plans):
        lines += ["", *listed] if listed else []
    lines += ["", *more] if more else []
    lines += ["", f"![prompts down, models across]({grid})", ""]
    return "\n".join(lines)


def numbers_section(results: Sequence[Result]) -> Section:
    """Win rates and mean scores: large for one result, a table for several."""
    shown = _tiles(results[0]) if len(results) == 1 else _table(results)
    warnings = [
        f"{result.model} by {result.scorer}: {line}"
        for result in results
        for line in result.warnings
    ]
    warnings += contradictions(results)
    plans = [
        f"{result.model} by {result.scorer}: {result.plan}"
        for result in results
        if result.plan is not None
    ]
    explanation = paragraph(
        "The win rate is the share of won pairs among those that are not tied. Intervals resample "
        "whole prompts, since images of one prompt resemble each other; the dashed mark is "
        "where neither model is better. The p-value is how often flipping the prompts' wins and "
        "losses by chance makes as one-sided a result"
        + (
            "."
            if results[0].holm is None
            else ", corrected (Holm) for all comparisons of the page that have one."
        )
    )
    return Section("Result", shown, notes(warnings), *map(paragraph, plans), explanation)


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
        result: whose two models are shown.
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
    wins = largest_gains({place: g for place, g in gains.items() if g > tie_tolerance}, count)
    losses = largest_gains({place: -g for place, g in gains.items() if g < -tie_tolerance}, count)
    return [
        Section(title, image_cards(grid_rows(folder, rows, sides, places, scores), sides))
        for title, places in (
            (f"Biggest wins of {result.model}", wins),
            (f"Biggest losses of {result.model}", losses),
        )
        if places
    ]


def largest_gains(gains: Mapping[Place, float], count: int) -> list[Place]:
    """Where gains are largest: one place a prompt while there are enough prompts."""
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
                    + f"{result.level}: {percent_interval(c.win_rate_interval)}; p "
                    + p_text(result.p_value)
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
                _with_text(Html(percent(c.win_rate)), f"p {html.escape(p_text(result.p_value))}"),
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
        [
            *["model", "scorer", "pairs", "win rate", level, "mean score"],
            f"difference, {level}",
        ],
        rows,
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
