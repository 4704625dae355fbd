"""Figures in pages: what stands between two markers is written by a script, and by nobody else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.evaluation.answer_report import Figure
from diffalign.evaluation.intervals import Interval


def fill(page: Path, name: str, figures: str) -> None:
    """Replace what stands between `<!-- NAME: ... -->` and `<!-- end of NAME -->`."""
    between = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    text, count = between.subn(lambda found: f"{found[1]}{figures}{found[2]}", page.read_text())
    if count != 1:
        raise SystemExit(f"{page}: expected the two markers of {name} once")
    page.write_text(text)


def figure(saved: Mapping[str, Any]) -> Figure:
    """A figure as JSON keeps it."""
    interval = saved["interval"]
    return Figure(**{**saved, "interval": interval and Interval(*interval)})
