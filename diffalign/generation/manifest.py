"""The list of what was generated: one line of JSON an image, in the order of the plan; and which of
a folder's images a grid shows.

Every line says how its image was made, so a folder of images explains itself, and a later run
knows both what is missing and whether it would generate it the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.errors import DataError
from diffalign.files import add_json_lines, inside, read_rows
from diffalign.imaging.grid import GridCell, GridRow, evenly_spaced
from diffalign.imaging.image_files import read_image

MANIFEST = "manifest.jsonl"

ItemKey = tuple[str, str, int]
"""Model, prompt id, seed."""

Place = tuple[str, int]
"""Prompt id and seed: one row of a grid, one pair of a comparison."""


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """One image."""

    model: str
    """The name that the config gave the model."""
    prompt: str
    prompt_id: str
    seed: int
    file: str
    """Relative to the manifest's folder, with forward slashes."""
    sha256: str
    """Of the file's bytes."""
    fingerprint: str
    """Of the model's weights."""
    sampler: Mapping[str, Any]
    """Everything else that shaped the image."""
    categories: Mapping[str, str] = field(default_factory=dict)
    """What the prompt is filed under: kind of category -> category."""

    @property
    def key(self) -> ItemKey:
        return self.model, self.prompt_id, self.seed


def read_manifest(folder: Path) -> list[ManifestRow]:
    """All rows in the order of generating; a re-generated image is once, as it is now.

    Raises:
        DataError: there is no manifest, or a line of it is not one of ours, or it names a file that
            does not lie in the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{folder}: there is no {MANIFEST} in this folder; diffalign generate writes one"
        )
    rows = read_rows(ManifestRow, path)
    for row in rows:
        inside(folder, row.file)
    return list({row.key: row for row in rows}.values())


def append_rows(folder: Path, rows: Iterable[ManifestRow]) -> None:
    """Add rows, all of them or none; those that are there already are left out."""
    add_json_lines(folder / MANIFEST, map(asdict, rows))


def file_digest(content: bytes) -> str:
    """The SHA-256 that manifests and score columns know an image by."""
    return hashlib.sha256(content).hexdigest()


# --- which images a grid shows ------------------------------------------------------------------


def spread_items(places: Sequence[Place], count: int) -> list[Place]:
    """At most `count` places, of as many different prompts as there are: evenly spaced prompts
    with their first seed, and only then further seeds."""
    by_prompt: dict[str, list[Place]] = {}
    for place in places:
        by_prompt.setdefault(place[0], []).append(place)
    prompts = list(by_prompt.values())
    if len(prompts) >= count:
        return [seeds[0] for seeds in evenly_spaced(prompts, count)]
    rounds = max(map(len, prompts))
    in_turn = [seeds[i] for i in range(rounds) for seeds in prompts if i < len(seeds)]
    chosen = set(in_turn[:count])
    return [place for place in places if place in chosen]


def open_image(folder: Path, row: ManifestRow | None) -> Image.Image | None:
    """The image of a row as RGB; None if it is gone or damaged."""
    if row is None:
        return None
    try:
        return read_image(folder / row.file)
    except OSError:
        return None


def grid_rows(
    folder: Path,
    rows: Mapping[ItemKey, ManifestRow],
    models: Sequence[str],
    places: Sequence[Place],
    scores: Mapping[ItemKey, float] | None = None,
) -> list[GridRow]:
    """Rows for `render_grid`.

    Args:
        folder: of the manifest.
        rows: the manifest.
        models: one column each.
        places: one row each.
        scores: written under the images; the only best of a row is outlined.
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
                zip([open_image(folder, row) for row in found], values, strict=True)
            )
        ]
        prompt = next((row.prompt for row in found if row is not None), prompt_id)
        result.append(
            GridRow(caption=prompt, note=f"seed {seed}" if several_seeds else "", cells=cells)
        )
    return result


MOST_COLUMNS = 6
"""As many as a grid is comfortably read with."""


def seeds_side_by_side(
    folder: Path,
    rows: Mapping[ItemKey, ManifestRow],
    models: Sequence[str],
    places: Sequence[Place],
    *,
    prompts: int,
    scores: Mapping[ItemKey, float] | None = None,
) -> tuple[list[GridRow], list[str]]:
    """Rows and column titles of a grid with several images of each model in a prompt's row.

    One image says little about a model. With two models a row has three of each, from the same
    three noises; with more models fewer fit.

    Args:
        folder, rows, models, scores: as for `grid_rows`.
        places: of the manifest, in its order.
        prompts: at most so many rows, evenly spaced.
    """
    chosen = [prompt for prompt, _ in spread_items(places, prompts)]
    seeds_of = {name: [seed for prompt, seed in places if prompt == name] for name in chosen}
    fewest = min(map(len, seeds_of.values()))
    count = max(1, min(MOST_COLUMNS // len(models), fewest))
    merged = []
    for prompt, seeds in seeds_of.items():
        same_noise = grid_rows(folder, rows, models, [(prompt, s) for s in seeds[:count]], scores)
        cells = [row.cells[i] for i in range(len(models)) for row in same_noise]
        merged.append(GridRow(caption=same_noise[0].caption, cells=cells))
    titles = [
        f"{model}, {number + 1}" if count > 1 else model
        for model in models
        for number in range(count)
    ]
    return merged, titles


def _only_best(values: Sequence[float | None]) -> int | None:
    """Position of the highest score, if all are there and no other reaches it."""
    known = [value for value in values if value is not None]
    if len(known) < max(2, len(values)) or known.count(max(known)) > 1:
        return None
    return known.index(max(known))
