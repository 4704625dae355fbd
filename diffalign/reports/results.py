"""Tables of what `compare` and `evaluate` wrote as JSON, whatever rows it holds.

A comparison has more rows from one version to the next: every list of rows is a table, every key of
a row a column, and `x_interval` stands with x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.pages.environment import part
from diffalign.pages.parts import Html, interval_bar, notes, paragraph, table
from diffalign.reports.run_folder import figures_of_models

_FIRST = ("scorer", "model", "baseline")
"""Columns that stand in front."""


def result_parts(content: Mapping[str, Any]) -> list[Html]:
    """The figures of a comparison or a benchmark: a table for each list of rows that it holds, and
    one for single figures with their intervals."""
    if figures_of_models(content):
        return [_side_by_side(content)]
    found: list[Html] = []
    for key, value in content.items():
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            if key != "comparisons":
                found.append(paragraph(key.replace("_", " ").capitalize()))
            found += _tables_of(value)
            found.append(notes(_cautions(value)))
    intervals = content.get("intervals")
    if isinstance(intervals, Mapping):
        rows = [
            [name.replace("_", " "), figure_in_words(content[name]), _interval(between)]
            for name, between in intervals.items()
            if content.get(name) is not None
        ]
        found.append(table([str(content.get("benchmark", "figure")), "value", "interval"], rows))
    return found


def _side_by_side(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Html:
    """One row a figure, one column a model."""
    labels = {name: str(f["label"]) for of in models.values() for name, f in of.items()}
    rows = [
        [label, *(_labelled(of.get(n)) for of in models.values())] for n, label in labels.items()
    ]
    return table(["", *models], rows)


def _labelled(figure: Mapping[str, Any] | None) -> str:
    """A figure with its unit and interval."""
    if figure is None:
        return ""
    interval = figure.get("interval")
    digits = 2 if figure.get("unit") == "points" else 1
    sign = "%" if figure.get("unit") == "percent" else ""

    def spelt(value: Any) -> str:
        return f"{value:.{digits}f}" if isinstance(value, (int, float)) else figure_in_words(value)

    ends = interval if isinstance(interval, Sequence) else ()
    around = f" ({' to '.join(map(spelt, ends))})" if len(ends) == 2 else ""
    return f"{spelt(figure['value'])}{sign}{around}"


def _tables_of(rows: Sequence[Mapping[str, Any]]) -> list[Html]:
    """Rows of figures. What is the same in all of several rows is said once; an interval
    `x_interval` stands below x, and on an axis where x is a rate; lists and mappings are left
    out."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [
        name
        for name in names
        if not name.endswith("_interval")
        and not any(isinstance(row.get(name), (list, Mapping)) for row in rows)
    ]
    same = {}
    if len(rows) > 1:
        plain = [n for n in columns if not any(f"{n}_interval" in row for row in rows)]
        same = {n: rows[0].get(n) for n in plain if len({str(row.get(n)) for row in rows}) == 1}
    columns = [name for name in columns if name not in same]
    columns.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    if len(rows) == 1:  # many columns of one row would not fit a screen
        there = [name for name in columns if rows[0].get(name) is not None]
        return [table(["", ""], [[n.replace("_", " "), _cell(rows[0], n)] for n in there])]
    parts = [
        table(
            [name.replace("_", " ") for name in columns],
            [[_cell(row, name) for name in columns] for row in rows],
        )
    ]
    if same:
        said = ", ".join(f"{name.replace('_', ' ')} {_value(name, v)}" for name, v in same.items())
        parts.append(paragraph(f"The same in all rows: {said}."))
    return parts


def _cell(row: Mapping[str, Any], name: str) -> str | Html:
    value, between = row.get(name), row.get(f"{name}_interval")
    if not (isinstance(between, Mapping) and {"low", "high"} <= between.keys()):
        return _value(name, value)
    low, high = between["low"], between["high"]
    bar: str | Html = ""
    if _is_rate(name) and isinstance(value, (int, float)):
        bar = interval_bar(value, low, high)
    return part("with_interval", _value(name, value), _ends(name, low, high), bar)


def _is_rate(name: str) -> bool:
    return "rate" in name.split("_")


def _value(name: str, value: Any) -> str:
    if _is_rate(name) and isinstance(value, (int, float)):
        return f"{value:.1%}"
    return figure_in_words(value)


def _ends(name: str, low: Any, high: Any) -> str:
    return f"{_value(name, low)} to {_value(name, high)}"


def _interval(between: Any) -> str:
    if not isinstance(between, Mapping) or "low" not in between or "high" not in between:
        return ""
    return f"{figure_in_words(between['low'])} to {figure_in_words(between['high'])}"


def figure_in_words(value: Any) -> str:
    """A value of a result, with four digits where it has a fraction."""
    if value is None:
        return "undefined"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (
        math.isfinite(value) and value == int(value) and abs(value) < 1e9
    ):
        return f"{int(value):,}"
    return f"{value:.4g}"


def _cautions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{row.get('model')} by {row.get('scorer')}: {said}"
        for row in rows
        for said in (row.get("notes") or [])
    ]
