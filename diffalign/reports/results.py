"""Tables of what `compare` and `evaluate` wrote as JSON, whatever rows it holds.

A comparison has more rows from one version to the next: every list of rows is a table, every key of
a row a column, and `x_interval` stands with x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.pages.parts import Html, notes, paragraph, table

_FIRST = ("scorer", "model", "baseline")
"""Columns that stand in front."""


def result_parts(content: Mapping[str, Any]) -> list[Html]:
    """The figures of a comparison or a benchmark: a table for each list of rows that it holds, and
    one for single figures with their intervals."""
    found: list[Html] = []
    for key, value in content.items():
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            if key != "comparisons":
                found.append(paragraph(key.replace("_", " ").capitalize()))
            found.append(_table_of(value))
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


def _table_of(rows: Sequence[Mapping[str, Any]]) -> Html:
    """Rows of figures; of an interval `x_interval` its ends stand next to x. Lists are left out."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [
        name
        for name in names
        if not name.endswith("_interval")
        and any(not isinstance(row.get(name), (list, Mapping)) for row in rows)
    ]
    columns.sort(key=lambda name: (name not in _FIRST, _FIRST.index(name) if name in _FIRST else 0))
    return table(
        [name.replace("_", " ") for name in columns],
        [[_with_interval(row, name) for name in columns] for row in rows],
    )


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    value, between = row.get(name), row.get(f"{name}_interval")
    around = _interval(between)
    return f"{figure_in_words(value)} ({around})" if around else figure_in_words(value)


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
