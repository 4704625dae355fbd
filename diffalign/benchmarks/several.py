"""Several models by one benchmark: differences to the first, paired by image.

Models that are asked about the same images err on the same ones, so that a difference is surer than
intervals of each model suggest. Whole clusters are resampled with what both models did with them;
p-values exchange the models cluster by cluster, and are corrected for all figures and models that
stand in the table together.

Sources: Cameron, Gelbach and Miller 2008 (pairs cluster bootstrap); Fisher 1935 (exchange); Holm
1979; Dror et al. 2018, The hitchhiker's guide to testing statistical significance in NLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.table import Table

from diffalign.benchmarks.report import Counted, Report, digits_of
from diffalign.errors import DataError
from diffalign.evidence import holm, swap_p_value
from diffalign.intervals import Bootstrap, Interval, Statistic, Tally

LEVEL = 0.05
"""Corrected p-values below it are marked."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One figure of a model, held against the first model on the clusters that both have."""

    value: float | None
    """Other less first; None where either is undefined."""
    interval: Interval | None
    p_value: float
    """Of "neither is better", two-sided."""
    holm: float = 1.0
    """The p-value, corrected for everything in the table."""


@dataclass(frozen=True, kw_only=True)
class SeveralModels:
    """Reports of several models, and how the others differ from the first."""

    reports: Mapping[str, Report]
    """By name; the first is what others are held against."""
    differences: Mapping[str, Mapping[str, Difference]]
    """By name of the others, by name of the figure."""
    notes: Sequence[str]

    @property
    def first(self) -> str:
        return next(iter(self.reports))


def compare_reports(reports: Mapping[str, Report]) -> SeveralModels:
    """Hold every report against the first.

    Args:
        reports: of one benchmark, by name; at least two.

    Raises:
        DataError: two models have no cluster, such as an image, in common.
    """
    (first, base), *others = reports.items()
    found: dict[str, dict[str, Difference]] = {}
    notes = []
    for name, report in others:
        before, after = base.whole.counted, report.whole.counted
        if before is None or after is None:
            notes.append(f"{name}: what its figures are made of is not kept by this benchmark.")
            continue
        known, others_known = _counting(before), _counting(after)
        shared = [cluster for cluster in known if cluster in set(others_known)]
        if not shared:
            raise DataError(
                f"{name} and {first} have none of their {base.resampled} in common "
                f"({', '.join(others_known[:3])}, and {', '.join(known[:3])}): give responses to "
                f"the same questions"
            )
        apart = len(known) + len(others_known) - 2 * len(shared)
        if apart:
            notes.append(
                f"{name} and {first} have {len(shared):,} {base.resampled} in common; differences "
                f"are over those, and leave out {apart:,} that one of them lacks."
            )
        found[name] = _differences(_at(before, shared), _at(after, shared), base.bootstrap)
    return SeveralModels(reports=reports, differences=_corrected(found), notes=notes)


def _counting(counted: Counted) -> list[str]:
    """The clusters with anything in them, such as images of which a question was answered."""
    some = np.atleast_1d(np.stack(list(counted.tally.values())).any(axis=0))
    return [name for name, is_there in zip(counted.names, some, strict=True) if is_there]


def _at(counted: Counted, names: Sequence[str]) -> Counted:
    """The counts of these clusters, in this order."""
    places = {name: place for place, name in enumerate(counted.names)}
    order = np.array([places[name] for name in names])
    tally = {name: np.asarray(c, float)[order] for name, c in counted.tally.items()}
    return replace(counted, names=tuple(names), tally=tally)


def _differences(before: Counted, after: Counted, bootstrap: Bootstrap) -> dict[str, Difference]:
    measures = {n: m for n, m in before.measures.items() if n in after.measures}
    counts = [name for name in before.tally if name in after.tally]
    sides = [{name: of.tally[name] for name in counts} for of in (before, after)]
    both = {f"{n}:{name}": side[name] for n, side in enumerate(sides) for name in counts}

    def differing(statistic: Statistic) -> Statistic:
        def difference(joined: Tally) -> Any:
            first, other = ({c: joined[f"{n}:{c}"] for c in counts} for n in (0, 1))
            return statistic(other) - statistic(first)

        return difference

    statistics = {name: differing(measure.statistic) for name, measure in measures.items()}
    intervals = bootstrap.intervals(both, statistics)
    totals = {name: np.asarray(c.sum()) for name, c in both.items()}
    found = {}
    for name, measure in measures.items():
        value = float(statistics[name](totals))
        found[name] = Difference(
            value=None if np.isnan(value) else value,
            interval=intervals[name],
            p_value=swap_p_value(sides[0], sides[1], measure.statistic, seed=bootstrap.seed),
        )
    return found


def _corrected(
    found: Mapping[str, Mapping[str, Difference]],
) -> dict[str, dict[str, Difference]]:
    every = [d for of_model in found.values() for d in of_model.values()]
    adjusted = iter(holm([difference.p_value for difference in every]) if every else [])
    return {
        model: {name: replace(d, holm=next(adjusted)) for name, d in of_model.items()}
        for model, of_model in found.items()
    }


def several_table(compared: SeveralModels) -> Table:
    """One table of all models, a row a figure and model."""
    base = compared.reports[compared.first]
    title = f"{base.benchmark}, differences to {compared.first}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading, justify in (
        ("", "left"),
        ("model", "left"),
        ("value", "right"),
        ("difference", "right"),
        (f"{base.bootstrap.confidence:.0%} interval", "left"),
        ("p", "right"),
    ):
        table.add_column(heading, justify="right" if justify == "right" else "left")
    for row in _rows(compared):
        table.add_row(*row)
    return table


def _rows(compared: SeveralModels) -> Iterator[tuple[str, ...]]:
    for name, figure in compared.reports[compared.first].whole.figures.items():
        digits = digits_of(figure.unit)

        def spelt(value: float | None, form: str = "", digits: int = digits) -> str:
            return "undefined" if value is None else f"{value:{form}.{digits}f}"

        yield figure.label, compared.first, spelt(figure.value), "", "", ""
        for model, of_model in compared.differences.items():
            if name not in of_model:
                continue
            d = of_model[name]
            around = d.interval and f"{spelt(d.interval.low, '+')} to {spelt(d.interval.high, '+')}"
            mark = " *" if d.holm < LEVEL else ""
            value = compared.reports[model].whole.figures[name].value
            yield (
                "",
                model,
                spelt(value),
                spelt(d.value, "+") + mark,
                around or "none",
                p_of(d.holm),
            )


def p_of(value: float) -> str:
    """A p-value for people."""
    return "< .001" if value < 0.001 else f"{value:.3f}"


def explanation(compared: SeveralModels) -> str:
    """What a reader of the table must know."""
    base = compared.reports[compared.first]
    return (
        f"Differences and their intervals are paired by {base.resampled}. P-values exchange the "
        f"models of whole {base.resampled} and are corrected (Holm) for all that stand here: the "
        f"chance of a single wrong * is at most {LEVEL:.0%}. Intervals are of each figure alone."
    )


def differences_as_dict(compared: SeveralModels) -> dict[str, Any]:
    """For JSON: by model and figure."""
    return {
        model: {
            name: {
                "value": d.value,
                "interval": d.interval and d.interval._asdict(),
                "p_value": d.p_value,
                "holm": d.holm,
            }
            for name, d in of_model.items()
        }
        for model, of_model in compared.differences.items()
    }
