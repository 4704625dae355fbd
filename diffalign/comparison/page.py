"""One HTML page that explains itself: images inside, no request to anywhere, light and dark.

    write_report(path, "Base against aligned", Section("Result", tiles(...), table(...)), ...)

Every builder escapes the text it is given; only `Html` passes unchanged.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.files import write_atomically
from diffalign.imaging.grid import GridCell, GridRow
from diffalign.imaging.image_files import PIXEL_ART, data_uri


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


@dataclass(frozen=True)
class Tile:
    """One number that should be seen first."""

    label: str
    value: str
    note: str | Html = ""


class Section:
    """A heading and what is under it."""

    def __init__(self, title: str, *parts: Html) -> None:
        self.title = title
        self.parts = parts


def write_report(path: Path, title: str, *sections: Section, lead: str = "") -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the file.
        title: heading and browser title.
        sections: from top to bottom.
        lead: a sentence under the title.
    """
    body = "".join(
        f"<section><h2>{html.escape(section.title)}</h2>{''.join(section.parts)}</section>"
        for section in sections
    )
    page = _PAGE.format(
        title=html.escape(title),
        lead=f'<p class="lead">{html.escape(lead)}</p>' if lead else "",
        policy=_POLICY,
        style=_STYLE,
        body=body,
    )
    write_atomically(path, page)


def paragraph(text: str | Html) -> Html:
    """Running text."""
    return Html(f"<p>{_markup(text)}</p>")


def notes(lines: Iterable[str]) -> Html:
    """Warnings that must be read; nothing where there are none."""
    items = "".join(f"<li>{_markup(line)}</li>" for line in lines)
    return Html(f'<ul class="notes">{items}</ul>' if items else "")


def command(text: str) -> Html:
    """A command line to copy."""
    return Html(f"<pre><code>{html.escape(text)}</code></pre>")


def settings_list(values: Mapping[str, object]) -> Html:
    """Names and values, such as settings."""
    rows = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{_markup(value)}</dd></div>"
        for name, value in values.items()
    )
    return Html(f'<dl class="settings">{rows}</dl>')


def tiles(items: Iterable[Tile]) -> Html:
    """Large numbers side by side."""
    cards = "".join(
        f'<div class="tile"><div class="label">{html.escape(item.label)}</div>'
        f'<div class="value">{html.escape(item.value)}</div>'
        f'<div class="note">{_markup(item.note)}</div></div>'
        for item in items
    )
    return Html(f'<div class="tiles">{cards}</div>')


def table(headers: Sequence[str], rows: Iterable[Sequence[str | Html]]) -> Html:
    """A table; the first column names its row."""
    head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{_markup(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return Html(f'<div class="wide"><table>{inside}</table></div>')


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
    middle = height / 2
    return Html(
        f'<svg class="interval {kind}" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{spoken}">'
        f'<line class="axis" x1="8" x2="{width - 8}" y1="{middle}" y2="{middle}"/>'
        f'<line class="neutral" x1="{x(neutral)}" x2="{x(neutral)}" y1="3" y2="{height - 3}"/>'
        f'<line class="range" x1="{x(low)}" x2="{x(high)}" y1="{middle}" y2="{middle}"/>'
        f'<circle cx="{x(estimate)}" cy="{middle}" r="5"/></svg>'
    )


def share_bar(parts: Mapping[str, int]) -> Html:
    """Counts as one bar of shares, such as wins, ties and losses, in that order."""
    total = sum(parts.values()) or 1
    pieces = "".join(
        f'<span class="share share-{i}" style="width:{100 * count / total:.2f}%" '
        f'title="{html.escape(name)}: {count}"></span>'
        for i, (name, count) in enumerate(parts.items())
    )
    legend = "".join(
        f'<span class="key key-{i}">{count} {html.escape(name)}</span>'
        for i, (name, count) in enumerate(parts.items())
    )
    return Html(f'<div class="shares">{pieces}</div><div class="legend">{legend}</div>')


def bars(counts: Mapping[str, int]) -> Html:
    """A histogram: one line a name, with its count and share of all."""
    total, most = sum(counts.values()) or 1, max(counts.values(), default=0) or 1
    lines = "".join(
        f'<div class="bar"><span class="name">{html.escape(name)}</span>'
        f'<span class="track"><span style="width:{100 * count / most:.1f}%"></span></span>'
        f'<span class="count">{count:,} ({100 * count / total:.1f} %)</span></div>'
        for name, count in counts.items()
    )
    return Html(f'<div class="bars">{lines}</div>')


def image_grid(rows: Sequence[GridRow], columns: Sequence[str]) -> Html:
    """The grid of `render_grid` as a table that scrolls sideways where a screen is narrow."""
    head = "<th></th>" + "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        f'<tr><th scope="row">{_caption(row)}</th>'
        + "".join(f"<td>{_cell(cell)}</td>" for cell in row.cells)
        + "</tr>"
        for row in rows
    )
    return Html(
        f'<div class="wide"><table class="images"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def image_cards(rows: Sequence[GridRow], columns: Sequence[str]) -> Html:
    """Each row as a card: its images side by side, its prompt below."""
    return mixed_cards([(row, columns) for row in rows])


def mixed_cards(rows: Sequence[tuple[GridRow, Sequence[str]]]) -> Html:
    """Cards of rows with titles of their own; more than two images are two on a line."""
    return Html(f'<div class="cards">{"".join(_card(*row) for row in rows)}</div>')


def _card(row: GridRow, columns: Sequence[str]) -> str:
    wraps = " wraps" if len(columns) > 2 else ""
    sides = "".join(
        f'<div><div class="side">{html.escape(name)}</div>{_cell(cell)}</div>'
        for name, cell in zip(columns, row.cells, strict=True)
    )
    return f'<div class="card"><div class="sides{wraps}">{sides}</div>{_caption(row)}</div>'


def _markup(value: object) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))


def _caption(row: GridRow) -> str:
    note = f"<small>{html.escape(row.note)}</small>" if row.note else ""
    return f'<div class="caption">{html.escape(row.caption)}{note}</div>'


def _cell(cell: GridCell | None) -> str:
    if cell is None:
        return '<div class="missing">no image</div>'
    small = " pixel-art" if max(cell.image.size) <= PIXEL_ART else ""
    winner = " winner" if cell.winner else ""
    score = f"<figcaption>{cell.score:.4g}</figcaption>" if cell.score is not None else ""
    return (
        f'<figure class="{(small + winner).strip()}"><img alt="" loading="lazy" '
        f'src="{data_uri(cell.image)}">{score}</figure>'
    )


_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)
"""Nothing is fetched and nothing is run, whatever a name or a prompt smuggles into the page."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{title}</h1>{lead}</header>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  --paper: #fcfcfa; --card: #ffffff; --ink: #1c1e22; --muted: #6a6e76; --line: #e4e5e1;
  --gain: #16805c; --loss: #b4442f; --tie: #b9bcc2; --shade: 0 1px 2px rgb(0 0 0 / .05);
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181c; --card: #1e2126; --ink: #e9eaec; --muted: #9a9fa8; --line: #30343b;
    --gain: #4cc596; --loss: #ee8a74; --tie: #565b64; --shade: none;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: 0; text-wrap: balance; }
h2 { font-size: 1.15rem; letter-spacing: -.01em; margin: 0 0 1rem; }
.lead { color: var(--muted); font-size: 1.05rem; margin: .6rem 0 0; max-width: 46rem; }
section { margin-top: 3rem; }
p { max-width: 46rem; }
.tiles { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }
.tile, .card {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.1rem 1.25rem; box-shadow: var(--shade);
}
.label, .note, .legend, .side, small, figcaption, dt { color: var(--muted); font-size: .85rem; }
.note > .interval, .note > .shares { margin: .5rem 0; }
.note > .interval { margin-left: -8px; }
.value { font-size: 2.1rem; font-weight: 600; letter-spacing: -.03em; line-height: 1.25; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .55rem 1rem .55rem 0; vertical-align: middle; }
thead th { color: var(--muted); font-weight: 500; font-size: .85rem; white-space: nowrap; }
tbody tr { border-top: 1px solid var(--line); }
.interval { display: block; overflow: visible; }
.interval line { stroke-linecap: round; }
.interval .axis { stroke: var(--line); stroke-width: 2; }
.interval .neutral { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 2 2; }
.interval .range { stroke: currentColor; stroke-width: 6; opacity: .45; }
.interval circle { fill: currentColor; }
.gain { color: var(--gain); } .loss { color: var(--loss); } .open { color: var(--muted); }
.shares { display: flex; gap: 2px; height: 12px; border-radius: 6px; overflow: hidden; }
.share-0 { background: var(--gain); } .share-1 { background: var(--tie); }
.share-2 { background: var(--loss); }
.legend { display: flex; gap: .2rem .9rem; margin-top: .5rem; flex-wrap: wrap; }
td .shares, td .legend { min-width: 17rem; }
.key::before {
  content: ""; display: inline-block; width: .6rem; height: .6rem; border-radius: 2px;
  margin-right: .4rem; background: var(--gain);
}
.key-1::before { background: var(--tie); } .key-2::before { background: var(--loss); }
.bars { display: grid; gap: .35rem; margin: 0 0 1.5rem; max-width: 46rem; }
.bar { display: grid; grid-template-columns: 9rem 1fr 9rem; gap: .75rem; align-items: center; }
.bar .name, .bar .count { font-size: .85rem; overflow-wrap: anywhere; }
.bar .count { color: var(--muted); }
.track { height: 10px; border-radius: 5px; background: var(--line); overflow: hidden; }
.track span { display: block; height: 100%; min-width: 2px; background: var(--gain); }
@media (max-width: 36rem) { .bar { grid-template-columns: 6rem 1fr 7rem; gap: .5rem; } }
figure { margin: 0; width: 100%; }
figure img {
  display: block; width: 100%; height: auto; border-radius: 6px; outline: 1px solid var(--line);
}
.pixel-art img { image-rendering: pixelated; }
.winner img { outline: 3px solid var(--gain); }
figcaption { text-align: center; padding-top: .25rem; }
.winner figcaption { color: var(--gain); font-weight: 600; }
.images { width: auto; }
.images tbody tr { border: 0; }
.images thead th { text-align: center; font-size: .95rem; color: var(--ink); padding-right: 0; }
.images td { padding: .4rem; width: 15rem; min-width: 9rem; }
.images th[scope=row] { font-weight: 400; padding-right: 1.25rem; }
.images thead th:first-child { width: 15rem; min-width: 9rem; }
.caption { overflow-wrap: anywhere; }
.caption small { display: block; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); }
.card .caption { margin-top: .6rem; }
.sides { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: .75rem; }
.sides.wraps { grid-auto-flow: row; grid-template-columns: 1fr 1fr; }
.side { margin-bottom: .3rem; overflow-wrap: anywhere; }
.missing {
  aspect-ratio: 1; display: grid; place-items: center; color: var(--muted); font-size: .85rem;
  border: 1px dashed var(--line); border-radius: 6px;
}
.settings { display: grid; gap: .1rem 2rem; margin: 0;
  grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); }
.settings div { display: flex; justify-content: space-between; gap: 1rem; padding: .35rem 0;
  border-bottom: 1px solid var(--line); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.notes { border-left: 3px solid var(--loss); margin: 1.25rem 0; padding: .2rem 0 .2rem 1.75rem; }
pre {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow-x: auto;
  padding: .8rem 1rem; font-size: .85rem; line-height: 1.5;
}
@media print { main { padding: 0; } .card, .tile { break-inside: avoid; } }
"""
