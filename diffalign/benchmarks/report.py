"""Reports of benchmarks: figures with intervals, counts, and what was left out."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from diffalign.intervals import Bootstrap, Interval, Statistic, Tally

LISTED = 10
"""Ids that are listed of what was left out; their number is always given."""

Unit = Literal["percent", "words", "points", "difference"]
"""Percent are shares, from 0 to 100; a difference is one of two shares, from -100 to 100."""


@dataclass(frozen=True)
class Measure:
    """How one figure follows from counts, and how it is called."""

    label: str
    """For people."""
    unit: Unit
    statistic: Statistic


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a report."""

    label: str
    unit: Unit
    value: float | None
    """None where it is undefined: nothing to divide by."""
    interval: Interval | None
    """None where there is nothing to resample."""

    @property
    def spelt(self) -> str:
        """Value and interval without their unit: `12.3 (10.1 to 14.8)`."""
        if self.value is None:
            return "undefined"
        around = f" ({_interval(self)})" if self.interval else ""
        return f"{self.value:.{digits_of(self.unit)}f}{around}"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Figures that belong together: of everything, or of one split or dimension."""

    figures: Mapping[str, Figure]
    counts: Mapping[str, int]
    clusters: int
    """That were resampled for the intervals."""
    counted: Counted | None = None
    """What the figures were made of; None where they are not to be compared with others."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Counts by cluster, and how figures follow from them: what a paired comparison needs."""

    names: tuple[str, ...]
    """Of the clusters, such as images; the same in the counts of another model."""
    tally: Tally
    """Counts by name, each of shape [clusters]."""
    measures: Mapping[str, Measure]
    """By name of the figure."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of one benchmark."""

    benchmark: str
    whole: Panel
    parts: Mapping[str, Panel] = field(default_factory=dict)
    """By split or dimension."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that shape the figures: tokeniser, judge, ..."""
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Ids by the reason why they count in no figure."""
    notes: Sequence[str] = ()
    """Cautions for whoever quotes the figures."""
    bootstrap: Bootstrap
    resampled: str = "images"
    """The clusters that the bootstrap resamples."""
    details: Sequence[Mapping[str, Any]] = ()
    """One row a response: what was found in it. Not part of the JSON; a job saves it on request."""

    def remarks(self) -> list[str]:
        """Notes, and what the intervals do not promise."""
        return [*self.notes, *self.bootstrap.cautions(self.whole.clusters, self.resampled)]


def panel(
    tally: Tally,
    measures: Mapping[str, Measure],
    bootstrap: Bootstrap,
    *,
    names: Sequence[str] = (),
) -> Panel:
    """Figures and their intervals from the counts of each cluster.

    Args:
        tally: counts by name, each of shape [clusters].
        measures: by name of the figure.
        bootstrap: how intervals are made.
        names: of the clusters; empty where the panel is not to be compared with another model's.
    """
    totals: dict[str, NDArray[np.float64]] = {k: np.asarray(v.sum()) for k, v in tally.items()}
    intervals = bootstrap.intervals(
        tally,
        {name: measure.statistic for name, measure in measures.items()},
        shares={name: 100.0 for name, m in measures.items() if m.unit == "percent"},
    )
    figures = {}
    for name, measure in measures.items():
        value = float(measure.statistic(totals))
        figures[name] = Figure(
            label=measure.label,
            unit=measure.unit,
            value=None if np.isnan(value) else value,
            interval=intervals[name]
            if measure.unit == "difference"
            else _from_zero(intervals[name]),
        )
    return Panel(
        figures=figures,
        counts={name: int(total) for name, total in totals.items()},
        clusters=len(next(iter(tally.values()))),
        counted=Counted(names=tuple(names), tally=tally, measures=measures) if names else None,
    )


def average_panel(
    tallies: Mapping[str, Tally],
    measures: Mapping[str, Measure],
    bootstrap: Bootstrap,
    *,
    names: Sequence[str],
    further: Mapping[str, Measure] | None = None,
) -> Panel:
    """Each figure as the plain mean over parts, such as splits or tasks; counts are sums.

    An image is resampled with what it has in all parts.

    Args:
        tallies: by part, all of the same clusters.
        measures: of each part.
        bootstrap: how intervals are made.
        names: of the clusters.
        further: functions of the joined counts `PART/NAME`, that stand behind the means.
    """
    joined = {f"{part}/{name}": counts for part, t in tallies.items() for name, counts in t.items()}

    def averaged(statistic: Statistic) -> Statistic:
        return lambda of_all: np.mean(
            [
                statistic({name: of_all[f"{part}/{name}"] for name in t})
                for part, t in tallies.items()
            ],
            axis=0,
        )

    means = {
        name: Measure(measure.label, measure.unit, averaged(measure.statistic))
        for name, measure in measures.items()
    }
    found = panel(joined, {**means, **(further or {})}, bootstrap, names=names)
    totals: dict[str, int] = {}
    for t in tallies.values():
        for name, counts in t.items():
            totals[name] = totals.get(name, 0) + int(counts.sum())
    return replace(found, counts=totals)


def _from_zero(interval: Interval | None) -> Interval | None:
    """An interval without what is below 0, where no length, rate or rating can be."""
    return interval and Interval(max(interval.low, 0.0), interval.high)


def as_json(report: Report) -> str:
    """One JSON object: figures, intervals, counts, parts, settings, what was left out, notes."""
    return json.dumps(as_dict(report), ensure_ascii=False)


def as_dict(report: Report) -> dict[str, Any]:
    """What `as_json` writes."""
    return {
        "benchmark": report.benchmark,
        **_plain(report.whole),
        **({"parts": {k: _plain(p) for k, p in report.parts.items()}} if report.parts else {}),
        **report.settings,
        "left_out": {
            reason: {"count": len(ids), "first": list(ids[:LISTED])}
            for reason, ids in report.left_out.items()
        },
        "notes": report.remarks(),
        "confidence": report.bootstrap.confidence,
        "interval": f"{report.bootstrap.describe} of {report.resampled}",
    }


def _plain(part: Panel) -> dict[str, Any]:
    return {
        **{name: figure.value for name, figure in part.figures.items()},
        "intervals": {
            name: figure.interval and figure.interval._asdict()
            for name, figure in part.figures.items()
        },
        "counts": dict(part.counts),
    }


def counts_line(part: Panel) -> str:
    """The counts that the figures of a panel are made of."""
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in part.counts.items())


def as_table(part: Panel, title: str, confidence: float) -> Table:
    """One panel, narrow enough for 80 columns."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column(f"{confidence:.0%} interval")
    for figure in part.figures.values():
        table.add_row(figure.label, _value(figure), _interval(figure))
    return table


def digits_of(unit: Unit) -> int:
    """Digits behind the point that a figure is shown with."""
    return 2 if unit == "points" else 1


def _value(figure: Figure) -> str:
    if figure.value is None:
        return "undefined"
    return f"{figure.value:.{digits_of(figure.unit)}f}" + "%" * (figure.unit == "percent")


def edge_notes(part: Panel, *, apart: Collection[str] = ()) -> list[str]:
    """Notes on percentages that are 0 or 100, and on figures that nothing defines.

    Args:
        part: a panel.
        apart: names of figures for which an end is nothing to speak of.
    """
    shown = [figure for name, figure in part.figures.items() if name not in apart]
    ends = [f"{f.label} {f.spelt}" for f in shown if f.unit == "percent" and f.value in (0, 100)]
    undefined = [figure.label for figure in shown if figure.value is None]
    notes = []
    if ends:
        notes.append(
            f"At an end of the scale: {'; '.join(ends)}. No exception was seen; an interval says "
            f"how many there may be."
        )
    if undefined:
        notes.append(f"Undefined, since nothing was there to count: {'; '.join(undefined)}.")
    return notes


def _interval(figure: Figure) -> str:
    if figure.interval is None:
        return "none"
    digits = digits_of(figure.unit)
    return f"{figure.interval.low:.{digits}f} to {figure.interval.high:.{digits}f}"
