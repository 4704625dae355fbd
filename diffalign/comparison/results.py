"""Comparisons in words and numbers: for a console, for a Markdown page, for other programs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from diffalign.comparison.compare import Comparison, Place
from diffalign.files import to_json
from diffalign.intervals import Interval

_LISTED_MISSING = 5


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model against the baseline, by one scorer."""

    scorer: str
    baseline: str
    model: str
    comparison: Comparison

    @property
    def level(self) -> str:
        """What the intervals are called."""
        return f"{self.comparison.confidence:.0%} interval"

    @property
    def warnings(self) -> list[str]:
        """What must be read next to the numbers, images without a partner included."""
        comparison = self.comparison
        return [
            *comparison.notes,
            *_missing(self.baseline, comparison.missing_baseline),
            *_missing(self.model, comparison.missing_model),
        ]


def _missing(side: str, places: Sequence[Place]) -> Iterable[str]:
    if places:
        listed = ", ".join(f"{prompt} seed {seed}" for prompt, seed in places[:_LISTED_MISSING])
        more = len(places) - _LISTED_MISSING
        yield (
            f"{len(places)} items are left out, {side} has no score for them: {listed}"
            + (f" and {more} more (all in compare.json)" if more > 0 else "")
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
    return table


def as_json(results: Sequence[Result], settings: Mapping[str, Any]) -> str:
    """Everything at full precision; intervals as `low` and `high`, or null."""

    def plain(result: Result) -> dict[str, Any]:
        values = {
            name: value._asdict() if isinstance(value, Interval) else value
            for name, value in vars(result.comparison).items()
        }
        names = {name: value for name, value in asdict(result).items() if name != "comparison"}
        return {**names, **values}

    content = {
        **settings,
        "comparisons": [plain(result) for result in results],
    }
    return to_json(content, indent=2) + "\n"


def markdown_text(text: str) -> str:
    """Text from a name, a prompt or a message for one line of markdown: shown, never obeyed."""
    plain = " ".join(text.split())
    return _MARKUP.sub(r"\\\g<0>", plain).replace("<", "&lt;").replace(">", "&gt;")


_MARKUP = re.compile(r"[\\`*_{}\[\]|#!~]|(?<=[A-Za-z])://|&(?=#?\w+;)")
"""What markdown would take for emphasis, code, links, tables, headings or entities; and the middle
of an address, which many readers turn into a link by themselves."""


def as_markdown(results: Sequence[Result], grid: str) -> str:
    """A table, what must be read next to it, and the grid.

    Args:
        results: at least one.
        grid: the grid's file, relative to the page.
    """
    first = results[0]
    lines = [
        f"| model against {markdown_text(first.baseline)} | scorer "
        f"| pairs (prompts) | won / tied / lost "
        f"| win rate of decided pairs ({first.level}) | ties as half | mean score "
        f"| difference ({first.level}) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        c = result.comparison
        lines.append(
            f"| {markdown_text(result.model)} | {markdown_text(result.scorer)} "
            f"| {c.items} ({c.prompts}) "
            f"| {c.wins} / {c.ties} / {c.losses} "
            f"| {percent(c.win_rate)} ({percent_interval(c.win_rate_interval)}) "
            f"| {percent(c.win_rate_ties_half)} | {c.baseline_mean:.3f} -> {c.model_mean:.3f} "
            f"| {c.mean_difference:+.3f} ({number_interval(c.mean_difference_interval)}) |"
        )
    warnings = [
        f"- {markdown_text(f'{result.model} by {result.scorer}: {line}')}"
        for result in results
        for line in result.warnings
    ]
    if warnings:
        lines += ["", *warnings]
    lines += ["", f"![prompts down, models across]({grid})", ""]
    return "\n".join(lines)
