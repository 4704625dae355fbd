"""The page of a run's previews: every prompt, and what the policy made of it at every step."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from diffalign.training.hooks.preview_makers import PreviewItem

_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Previews</title>
<style>
body { margin: 1.5rem; font: 15px/1.45 system-ui, sans-serif; color: #1c1e22;
  background: #fcfcfa; }
h1 { font-size: 1.3rem; margin: 0 0 1rem; }
.steps { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid #e2e3e0; vertical-align: top;
  text-align: left; }
thead th { color: #70747c; font-weight: 600; white-space: nowrap; }
tbody th { position: sticky; left: 0; background: #fcfcfa; font-weight: 400; min-width: 10rem;
  max-width: 16rem; }
td img { display: block; width: 160px; image-rendering: auto; }
tbody th img { display: block; width: 96px; margin-top: .4rem; }
td p { margin: 0; width: 16rem; white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
"""


def page_of(
    previewed: Sequence[PreviewItem], rows: Sequence[Sequence[Path | None]], steps: Sequence[int]
) -> str:
    """HTML that shows files of its own folder, and needs nothing else.

    Args:
        previewed: of the rows.
        rows: one an item, with the file of every step: an image, or a text.
        steps: of the columns.
    """
    named = ["start" if step == 0 else f"step {step:,}" for step in steps]
    titles = "".join(f"<th>{name}</th>" for name in named)
    body = "\n".join(
        f"<tr>{_heading(number, item)}{''.join(map(_cell, row))}</tr>"
        for number, (item, row) in enumerate(zip(previewed, rows, strict=True))
    )
    return (
        f"{_HEAD}<h1>Previews</h1>\n<div class=steps><table>\n"
        f"<thead><tr><th>prompt</th>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
        f"</table></div>\n</html>\n"
    )


def _heading(number: int, item: PreviewItem) -> str:
    image = f'<img src="question-{number}.png" alt="">' if item.images else ""
    return f"<th>{html.escape(item.caption)}{image}</th>"


def _cell(frame: Path | None) -> str:
    if frame is None:
        return "<td></td>"
    if frame.suffix == ".txt":
        return f"<td><p>{html.escape(frame.read_text(encoding='utf-8'))}</p></td>"
    return f'<td><img src="{html.escape(frame.name)}" alt="" loading="lazy"></td>'
