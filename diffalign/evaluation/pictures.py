"""Choose pictures of a generated folder and open them for a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from diffalign.evaluation.grid import GridCell, GridRow
from diffalign.evaluation.manifest import ItemKey, ManifestRow

Place = tuple[str, int]
"""Prompt id and seed: one row of a grid, one pair of a comparison."""


def spread_items(places: Sequence[Place], count: int) -> list[Place]:
    """At most `count` places, of as many different prompts as there are: evenly spaced prompts
    with their first seed, and only then further seeds."""
    by_prompt: dict[str, list[Place]] = {}
    for place in places:
        by_prompt.setdefault(place[0], []).append(place)
    prompts = list(by_prompt.values())
    if len(prompts) >= count:
        return [prompts[i * len(prompts) // count][0] for i in range(count)]
    rounds = max(map(len, prompts))
    in_turn = [seeds[i] for i in range(rounds) for seeds in prompts if i < len(seeds)]
    chosen = set(in_turn[:count])
    return [place for place in places if place in chosen]


def open_picture(folder: Path, row: ManifestRow | None) -> Image.Image | None:
    """The picture of a row as RGB; None if it is gone or damaged."""
    if row is None:
        return None
    try:
        with Image.open(folder / row.file) as image:
            return image.convert("RGB")
    except OSError:
        return None


def grid_rows(
    folder: Path,
    rows: Mapping[ItemKey, ManifestRow],
    models: Sequence[str],
    places: Sequence[Place],
    scores: Mapping[ItemKey, float] | None = None,
) -> list[GridRow]:
    """Rows for `draw_grid`.

    Args:
        folder: of the manifest.
        rows: the manifest.
        models: one column each.
        places: one row each.
        scores: written under the pictures; the only best of a row is outlined.
    """
    scores = scores or {}
    several_seeds = len({seed for _, seed in places}) > 1
    result = []
    for prompt_id, seed in places:
        keys = [(model, prompt_id, seed) for model in models]
        found = [rows.get(key) for key in keys]
        values = [scores.get(key) for key in keys]
        best = _only_best(values)
        cells = [
            None if image is None else GridCell(image=image, score=value, winner=i == best)
            for i, (image, value) in enumerate(
                zip([open_picture(folder, row) for row in found], values, strict=True)
            )
        ]
        prompt = next((row.prompt for row in found if row is not None), prompt_id)
        result.append(
            GridRow(caption=prompt, note=f"seed {seed}" if several_seeds else "", cells=cells)
        )
    return result


def _only_best(values: Sequence[float | None]) -> int | None:
    """Position of the highest score, if all are there and no other reaches it."""
    known = [value for value in values if value is not None]
    if len(known) < max(2, len(values)) or known.count(max(known)) > 1:
        return None
    return known.index(max(known))
