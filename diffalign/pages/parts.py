"""One HTML page that explains itself: images inside, no request to anywhere, light and dark.

    write_report(path, "Base against aligned", Section("Result", tiles(...), table(...)), ...)

Every builder escapes the text it is given; only `Html` passes unchanged. The markup is in
`templates/parts.html`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup as Html

from diffalign.files import write_atomically
from diffalign.imaging.grid import GridRow
from diffalign.pages.environment import SHOWS_FILES, part, render


@dataclass(frozen=True)
class Tile:
    """One number that should be seen first."""

    label: str
    value: str
    note: str | Html = ""


class Section:
    """A heading and what is under it."""

    def __init__(
        self, title: str, *parts: Html, scripts: Sequence[str] = (), shows_files: bool = False
    ) -> None:
        """Args:
        title: the heading.
        parts: from top to bottom.
        scripts: names of scripts next to the templates that the parts need.
        shows_files: whether the parts show images of files next to the page.
        """
        self.title, self.parts = title, parts
        self.scripts, self.shows_files = tuple(scripts), shows_files


def write_report(path: Path, title: str, *sections: Section, lead: str = "") -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the file.
        title: heading and browser title.
        sections: from top to bottom.
        lead: a sentence under the title.
    """
    write_atomically(path, page_of(title, *sections, lead=lead))


def page_of(
    title: str,
    *sections: Section,
    lead: str = "",
    above: str | Html = "",
    allow: Mapping[str, str] | None = None,
) -> str:
    """The page that `write_report` writes.

    Args:
        title, sections, lead: as there.
        above: a line over the title, such as the way back.
        allow: what the page's policy allows; see `render`.
    """
    files = any(section.shows_files for section in sections)
    return render(
        "sections.html",
        scripts=tuple(dict.fromkeys(name for section in sections for name in section.scripts)),
        allow=allow if allow is not None else SHOWS_FILES if files else {},
        title=title,
        lead=lead,
        above=above,
        sections=sections,
    )


def paragraph(text: str | Html) -> Html:
    """Running text."""
    return part("paragraph", text)


def notes(lines: Iterable[str]) -> Html:
    """Warnings that must be read; nothing where there are none."""
    return part("notes", list(lines))


def command(text: str) -> Html:
    """A command line to copy."""
    return part("command", text)


def settings_list(values: Mapping[str, object]) -> Html:
    """Names and values, such as settings."""
    return part("settings_list", values)


def tiles(items: Iterable[Tile]) -> Html:
    """Large numbers side by side."""
    return part("tiles", list(items))


def table(headers: Sequence[str], rows: Iterable[Sequence[str | Html]]) -> Html:
    """A table; the first column names its row."""
    return part("table", headers, list(rows))


def interval_bar(
    estimate: float,
    low: float,
    high: float,
    *,
    minimum: float = 0.0,
    maximum: float = 1.0,
    neutral: float = 0.5,
) -> Html:
    """An estimate and its interval on an axis, with a mark where there is no difference.

    Args:
        estimate: the dot.
        low: start of the bar.
        high: its end.
        minimum: left end of the axis.
        maximum: right end of the axis.
        neutral: the mark; an interval wholly right of it is rendered as a gain, left of it as a
            loss.
    """
    width, height = 180, 22

    def x(value: float) -> float:
        inside = min(max(value, minimum), maximum)
        return round(8 + (width - 16) * (inside - minimum) / (maximum - minimum), 1)

    spoken = f"{estimate:.3g}, interval {low:.3g} to {high:.3g}"
    kind = "gain" if low > neutral else "loss" if high < neutral else "open"
    places = map(x, (neutral, low, high, estimate))
    return part("interval_bar", kind, spoken, width, height, *places)


def share_bar(parts: Mapping[str, int]) -> Html:
    """Counts as one bar of shares, such as wins, ties and losses, in that order."""
    return part("share_bar", parts, sum(parts.values()) or 1)


def bars(counts: Mapping[str, int]) -> Html:
    """A histogram: one line a name, with its count and share of all."""
    total, most = sum(counts.values()) or 1, max(counts.values(), default=0) or 1
    return part("bars", counts, total, most)


def image_grid(rows: Sequence[GridRow], columns: Sequence[str]) -> Html:
    """The grid of `render_grid` as a table that scrolls sideways where a screen is narrow."""
    return part("image_grid", rows, columns)


def image_cards(rows: Sequence[GridRow], columns: Sequence[str]) -> Html:
    """Each row as a card: its images side by side, its prompt below."""
    return mixed_cards([(row, columns) for row in rows])


def mixed_cards(rows: Sequence[tuple[GridRow, Sequence[str]]]) -> Html:
    """Cards of rows with titles of their own; more than two images are two on a line."""
    return part("mixed_cards", rows)


def heading(text: str) -> Html:
    """A heading within a section."""
    return part("heading", text)


def fold(title: str, content: Html, *, open: bool = False) -> Html:
    """What is seen once its title is clicked; nothing where there is no content."""
    return part("fold", title, content, open) if content else content


def link(text: str, target: str) -> Html:
    """A link to another page or file; `target` is not looked at."""
    return part("link", text, target)


def sheet(source: str, alt: str) -> Html:
    """An image of the page's width at most, such as a grid; `source` is its address or data."""
    return part("sheet", source, alt)


def frames(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Html:
    """What was made of the same prompts at several times, one column each.

    Args:
        columns: titles.
        rows: with `caption`, `question` (an image's address, or nothing) and `frames`: one a column
            with `image` (an address) or `text`.
    """
    return part("frames", columns, rows)
