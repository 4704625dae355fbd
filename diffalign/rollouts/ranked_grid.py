"""The image that a round leaves behind: a few prompts, their images from best to worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.files import write_image, writing
from diffalign.imaging.grid import GridCell, GridRow, render_grid
from diffalign.imaging.image_files import read_image
from diffalign.imaging.subsample import evenly_spaced_with_ends

_MOST_ROWS = 6
_MOST_COLUMNS = 6


@dataclass(frozen=True)
class RankedGroup:
    """The images of one prompt, from best to worst."""

    prompt: str
    files: Sequence[Path]
    """Images; absent ones are shown as missing."""
    scores: Sequence[float | None]
    """Written under them."""


def render_ranked_grid(path: Path, groups: Sequence[RankedGroup], *, title: str) -> None:
    """Render evenly spaced ones of the groups.

    Args:
        path: of the PNG to write.
        groups: at least one, each with the same number of images.
        title: above everything.
    """
    count = len(groups[0].files)
    ranks = evenly_spaced_with_ends(range(count), _MOST_COLUMNS)
    rows = [
        GridRow(
            caption=group.prompt,
            cells=[_cell(group.files[rank], group.scores[rank]) for rank in ranks],
        )
        for group in evenly_spaced_with_ends(groups, _MOST_ROWS)
    ]
    titles = [{0: "best", count - 1: "worst"}.get(rank, str(rank + 1)) for rank in ranks]
    with writing(path):
        write_image(path, render_grid(rows, titles, title=title))


def _cell(file: Path, score: float | None) -> GridCell | None:
    if not file.exists():
        return None
    return GridCell(image=read_image(file), score=score)
