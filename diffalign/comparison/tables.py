"""Tables of figures next to the result: all pairs of models, categories of prompts, how much the
images of a model differ. Each is made once and shown on the console, as Markdown and on the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from diffalign.comparison.compare import Comparison
from diffalign.comparison.judged import PositionBias
from diffalign.comparison.report import markdown_text, p_text, percent, percent_interval
from diffalign.comparison.results import Result
from diffalign.intervals import Interval
from diffalign.pages.parts import Section, notes, paragraph, table

LEVEL = 0.05
"""Corrected p-values below it are marked."""
_FEW = 0.5


@dataclass(frozen=True, kw_only=True)
class FigureTable:
    """A table of text, with what a reader must know of it."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    explanation: str
    cautions: tuple[str, ...] = ()

    def console(self) -> Table:
        """For a terminal."""
        shown = Table(
            *self.headings,
            title=escape(self.title),
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
        )
        for row in self.rows:
            shown.add_row(*map(escape, row))
        return shown

    def markdown(self) -> list[str]:
        """Lines of a page, without a blank one at either end."""
        return [
            f"### {markdown_text(self.title)}",
            "",
            _markdown_row(self.headings),
            "|" + "---|" * len(self.headings),
            *map(_markdown_row, self.rows),
            "",
            markdown_text(self.explanation),
            *(f"- {markdown_text(line)}" for line in self.cautions),
        ]

    def section(self) -> Section:
        """Of the page."""
        return Section(
            self.title,
            table(self.headings, self.rows),
            notes(list(self.cautions)),
            paragraph(self.explanation),
        )


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown_text, cells))} |"


def pairs_table(results: Sequence[Result]) -> FigureTable:
    """All pairs of models by one scorer, the surest first.

    Args:
        results: of every pair, all of one scorer; at least one.
    """
    first = results[0]
    ordered = sorted(
        (_winner_first(result) for result in results), key=lambda row: (row[1], -row[0][3])
    )
    rows = []
    for (better, other, interval, rate, counts), p_value in ordered:
        mark = " *" if p_value < LEVEL else ""
        rows.append((better, other, f"{percent(rate)}{mark}", interval, counts, p_text(p_value)))
    sure = sum(p_value < LEVEL for _, p_value in ordered)
    return FigureTable(
        title=f"Every model against every other by {first.scorer}",
        headings=(
            *("model", "against", "win rate, ties as half", first.level),
            *("won / tied / lost", "p-value"),
        ),
        rows=tuple(rows),
        explanation=(
            f"{sure} of {len(rows)} pairs are told apart (*): p-values are corrected (Holm) for "
            f"all comparisons that have one, so that the chance of a single wrong * is at most "
            f"{LEVEL:.0%}. Intervals are of each pair alone."
        ),
    )


_Row = tuple[str, str, str, float, str]


def _winner_first(result: Result) -> tuple[_Row, float]:
    c = result.comparison
    rate, interval = c.win_rate_ties_half, c.win_rate_ties_half_interval
    better, other, won, lost = result.model, result.baseline, c.wins, c.losses
    if rate < _FEW:
        better, other, won, lost, rate = other, better, lost, won, 1 - rate
        interval = None if interval is None else type(interval)(1 - interval.high, 1 - interval.low)
    counts = f"{won} / {c.ties} / {lost}"
    return (better, other, percent_interval(interval), rate, counts), result.p_value


def category_tables(results: Sequence[Result]) -> list[FigureTable]:
    """One table for each scorer and kind of category that the prompts have.

    Args:
        results: against the baseline.
    """
    found = []
    for scorer in dict.fromkeys(result.scorer for result in results):
        of_scorer = [result for result in results if result.scorer == scorer]
        kinds = dict.fromkeys(each.kind for result in of_scorer for each in result.categories)
        found += [_category_table(scorer, kind, of_scorer) for kind in kinds]
    return found


def _category_table(scorer: str, kind: str, results: Sequence[Result]) -> FigureTable:
    rows = []
    for result in results:
        of_kind = {
            each.category: each.comparison for each in result.categories if each.kind == kind
        }
        rows += [_category_row(result.model, name, c) for name, c in of_kind.items()]
        if of_kind:
            rows.append(_mean_row(result.model, list(of_kind.values())))
    count = sum(row[1] != _MEAN for row in rows)
    confidence = results[0].comparison.confidence
    return FigureTable(
        title=f"By {kind}, {scorer}",
        headings=("model", kind, "prompts", "win rate, ties as half", results[0].level, "score"),
        rows=tuple(rows),
        explanation=(
            f"Each interval is of its category alone: of {count} at {confidence:.0%}, about "
            f"{(1 - confidence) * count:.1f} miss their truth by chance, so a single category that "
            f"stands out proves little. The mean of categories counts each of them once, however "
            f"many prompts it has."
        ),
    )


_MEAN = "mean of categories"


def _category_row(model: str, name: str, c: Comparison) -> tuple[str, ...]:
    return (
        model,
        name,
        str(c.prompts),
        percent(c.win_rate_ties_half),
        percent_interval(c.win_rate_ties_half_interval),
        f"{c.baseline_mean:.3f} -> {c.model_mean:.3f}",
    )


def _mean_row(model: str, comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    def mean(name: str) -> float:
        return sum(getattr(c, name) for c in comparisons) / len(comparisons)

    return (
        *(model, _MEAN, "", percent(mean("win_rate_ties_half")), ""),
        f"{mean('baseline_mean'):.3f} -> {mean('model_mean'):.3f}",
    )


def diversity_table(scorer: str, figures: Mapping[str, Mapping[str, float]]) -> FigureTable:
    """How much the images of a prompt differ, and how far models are from their base.

    Args:
        scorer: whose features were taken.
        figures: name of the figure -> model -> value, as `diversity.Diversity` wrote them.
    """
    models = dict.fromkeys(model for values in figures.values() for model in values)
    return FigureTable(
        title=f"Diversity by the features of {scorer}",
        headings=("model", *(name.replace("_", " ") for name in figures)),
        rows=tuple(
            (model, *(f"{v[model]:.4f}" if model in v else "" for v in figures.values()))
            for model in models
        ),
        explanation=(
            "The Vendi score is the number of different images that a prompt's are worth: 1 where "
            "they are all alike, as many as there are where none is like another. A model that "
            "falls below its base has bought its wins with sameness."
        ),
    )


def position_table(scorer: str, bias: PositionBias) -> FigureTable:
    """How far the verdicts of a pair judge depend on which image is shown first."""
    return FigureTable(
        title=f"Position bias of {scorer}",
        headings=("pairs", "first shown is preferred", "95 % interval", "same winner both ways"),
        rows=(
            (
                f"{bias.pairs:,}",
                f"{bias.first_shown:.3f}",
                percent_interval(None if bias.interval is None else Interval(*bias.interval)),
                percent(bias.same_winner),
            ),
        ),
        explanation=(
            "Every pair was shown in both orders and counts by the mean of both, which takes the "
            "bias out of who wins. A judge that prefers the first in far more than a half, or has "
            "the same winner in few pairs, sees little in the images: take another."
        ),
    )
