"""Figures in pages: what is between two markers is written by a script, and by nobody else.

A table of several runs keeps the rows of runs that are not there: a figure that took a day is not
lost because somebody measured another one in a new clone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.benchmarks.report import Figure
from diffalign.intervals import Interval


def fill(page: Path, name: str, figures: str) -> None:
    """Replace what is between `<!-- NAME: ... -->` and `<!-- end of NAME -->`."""
    text = page.read_text(encoding="utf-8")
    start, end = _place(page, name, text)
    page.write_text(text[:start] + figures + text[end:], encoding="utf-8")


def filled(page: Path, name: str) -> str:
    """What is between the two markers."""
    text = page.read_text(encoding="utf-8")
    start, end = _place(page, name, text)
    return text[start:end]


def _place(page: Path, name: str, text: str) -> tuple[int, int]:
    between = re.compile(rf"<!-- {name}: [^\n]*-->\n(.*?)<!-- end of {name} -->", re.DOTALL)
    found = list(between.finditer(text))
    if len(found) != 1:
        raise SystemExit(f"{page}: expected the two markers of {name} once")
    return found[0].span(1)


def merged(before: str, head: Sequence[str], rows: Mapping[str, str], order: Sequence[str]) -> str:
    """A table that takes the new rows, and from the one before it all others.

    Args:
        before: a Markdown table, perhaps with text after it; or nothing.
        head: the two first lines of the new table.
        rows: new lines by the text of their first cell.
        order: first cells of all rows that the table may have.

    Raises:
        SystemExit: a row is kept from a table with columns that are there no more.
    """
    lines = [line for line in before.splitlines() if line.startswith("|")]
    kept = {line.split("|")[1].strip(): line for line in lines[2:]}
    kept = {cell: line for cell, line in kept.items() if cell in order and cell not in rows}
    if kept and lines[:2] != list(head):
        kept = {cell: _widened(line, lines[0], head[0], kept) for cell, line in kept.items()}
    together = {**kept, **rows}
    return "\n".join([*head, *(together[cell] for cell in order if cell in together)])


def _widened(line: str, before: str, now: str, kept: Mapping[str, str]) -> str:
    """A row under more columns than it was measured for; what is new stays empty.

    Raises:
        SystemExit: a column of the row is there no more.
    """
    old, new = ([cell.strip() for cell in text.split("|")[1:-1]] for text in (before, now))
    if not set(old) <= set(new):
        raise SystemExit(
            f"the columns of the table have changed, so that {', '.join(kept)} cannot be kept: "
            f"measure all rows again"
        )
    cells = dict(zip(old, (cell.strip() for cell in line.split("|")[1:-1]), strict=True))
    return f"| {' | '.join(cells.get(name, '') for name in new)} |"


def figure(saved: Mapping[str, Any]) -> Figure:
    """A figure as JSON keeps it."""
    interval = saved["interval"]
    return Figure(**{**saved, "interval": interval and Interval(*interval)})
