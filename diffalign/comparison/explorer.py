"""All images of a comparison on its page: filtered by prompt, sorted by score or difference, and
two of them under a slider.

Reduced images lie within the page, so that it can be moved and sent alone; the full ones are linked
by their place next to it, and shown where they are there. What a page of many images takes to open
is measured by `scripts/bench_pages.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diffalign.generation.manifest import ItemKey, ManifestRow, Place, open_image
from diffalign.imaging.image_files import data_uri
from diffalign.pages.environment import part
from diffalign.pages.parts import Section

SIDES = ((300, 448), (1000, 320), (2400, 224))
"""Images at most, and the longer side that they are reduced to, in pixels; of more images than the
last line says, those of later seeds are linked and not within the page."""
_QUALITY = 78


def explorer_section(
    folder: Path,
    page: Path,
    rows: Mapping[ItemKey, ManifestRow],
    models: Sequence[str],
    scores: Mapping[str, Mapping[ItemKey, float]],
    *,
    tie_tolerance: float = 0.0,
    served: str | None = None,
) -> Section:
    """Every prompt and seed with the images of all models.

    Args:
        folder: of the manifest.
        page: the file of the page.
        rows: the manifest.
        models: columns, the baseline first.
        scores: by scorer, then by model, prompt id and seed.
        tie_tolerance: smaller differences are neither won nor lost.
        served: the address of the folder where a server shows the page: images are then asked for
            when they are seen, and none is within it.
    """
    places = list(dict.fromkeys((prompt, seed) for _, prompt, seed in rows))
    within, side = ([], 0) if served is not None else _reduced(places, len(models))
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow lets the GIL go
        embedded = dict(
            zip(
                within_keys := [(m, *place) for place in within for m in models],
                threads.map(lambda key: _embedded(folder, rows.get(key), side), within_keys),
                strict=True,
            )
        )
    data: dict[str, Any] = {
        "models": list(models),
        "scorers": list(scores),
        "tolerance": tie_tolerance,
        "rows": [
            {
                "prompt": next(row.prompt for m in models if (row := rows.get((m, *p)))),
                "seed": p[1],
                "cells": [
                    {
                        "image": embedded.get((m, *p)),
                        "file": _address(page.parent, folder, rows.get((m, *p)), served),
                    }
                    | {"scores": [column.get((m, *p)) for column in scores.values()]}
                    for m in models
                ],
            }
            for p in places
            if any((m, *p) in rows for m in models)
        ],
    }
    left_out = len(places) - len(within) if served is None else 0
    note = (
        f"The images of {left_out:,} further seeds are not within this page: they are shown from "
        f"the files next to it."
        if left_out
        else ""
    )
    return Section(
        "All images",
        part("explorer", data, note, of="explorer.html"),
        scripts=("explorer.js",),
        shows_files=True,
    )


def _reduced(places: Sequence[Place], models: int) -> tuple[list[Place], int]:
    """Whose images are within the page, and their longer side."""
    for most, side in SIDES:
        if len(places) * models <= most:
            return list(places), side
    most, side = SIDES[-1]
    nth: dict[str, int] = {}
    turns = []
    for place in places:
        nth[place[0]] = nth.get(place[0], -1) + 1
        turns.append((nth[place[0]], place))
    first = sorted(turns, key=lambda turn: turn[0])[: max(1, most // models)]
    return [place for _, place in first], side


def _address(page: Path, folder: Path, row: ManifestRow | None, served: str | None) -> str | None:
    """Where a page in one folder finds the file of an image."""
    if row is None:
        return None
    if served is not None:
        return f"{served}/{quote(row.file)}"
    try:
        return quote(Path(os.path.relpath(folder / row.file, page)).as_posix())
    except ValueError:  # on another drive
        return None


def _embedded(folder: Path, row: ManifestRow | None, side: int) -> str | None:
    image = open_image(folder, row)
    if image is None:
        return None
    return data_uri(image, side=side, form="webp", quality=_QUALITY)
