"""Grids of a comparison as PNG files: prompts x seeds, the best and the worst by difference, and
checkpoints as a strip. Prompts x models is `comparison.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffalign.comparison.report import largest_gains
from diffalign.files import write_image
from diffalign.generation.manifest import ItemKey, ManifestRow, Place, grid_rows, spread_items
from diffalign.imaging.grid import GridRow, evenly_spaced, evenly_spaced_with_ends, render_grid

FOLDER = "grids"
_MOST_SEEDS, _MOST_CHECKPOINTS = 6, 8
"""Columns."""


def write_grids(
    folder: Path,
    output: Path,
    rows: Mapping[ItemKey, ManifestRow],
    models: Sequence[str],
    scores: Mapping[ItemKey, float],
    *,
    prompts: int,
    tie_tolerance: float = 0.0,
) -> list[Path]:
    """Write `seeds-MODEL.png` of each model that has several seeds, and `best-MODEL.png` and
    `worst-MODEL.png` of each but the baseline.

    Args:
        folder: of the manifest.
        output: where the files go.
        rows: the manifest.
        models: the baseline first.
        scores: by model, prompt id and seed.
        prompts: rows of a grid at most; 0 writes none.
        tie_tolerance: smaller differences are neither among the best nor among the worst.

    Returns:
        The files, as they were written.
    """
    written: list[Path] = []
    if prompts < 1:
        return written

    def write(name: str, shown: Sequence[GridRow], columns: Sequence[str], title: str) -> None:
        if shown:
            written.append(output / f"{name}.png")
            write_image(written[-1], render_grid(shown, columns, title=title))

    places = list(dict.fromkeys((prompt, seed) for _, prompt, seed in rows))
    seeds = sorted({seed for _, seed in places})
    for model in models:
        if len(seeds) > 1:
            columns = [f"seed {seed}" for seed in seeds[:_MOST_SEEDS]]
            shown = prompts_by_seeds(
                folder, rows, model, seeds[:_MOST_SEEDS], prompts=prompts, scores=scores
            )
            write(f"seeds-{model}", shown, columns, model)
    for model in models[1:]:
        pair = (models[0], model)
        gains = differences(scores, *pair)
        for name, sign, title in (("best", 1, "largest gains"), ("worst", -1, "largest losses")):
            found = {place: sign * gain for place, gain in gains.items()}
            chosen = {place: gain for place, gain in found.items() if gain > tie_tolerance}
            shown = grid_rows(folder, rows, pair, largest_gains(chosen, prompts), scores)
            write(f"{name}-{model}", shown, pair, f"{title} of {model} over {models[0]}")
    return written


def prompts_by_seeds(
    folder: Path,
    rows: Mapping[ItemKey, ManifestRow],
    model: str,
    seeds: Sequence[int],
    *,
    prompts: int,
    scores: Mapping[ItemKey, float] | None = None,
) -> list[GridRow]:
    """Rows of a grid: prompts down, evenly spaced among all, seeds of one model across."""
    names = list(dict.fromkeys(prompt for of, prompt, _ in rows if of == model))
    found = []
    for prompt in evenly_spaced(names, prompts):
        cells = [grid_rows(folder, rows, [model], [(prompt, seed)], scores)[0] for seed in seeds]
        found.append(GridRow(caption=cells[0].caption, cells=[cell.cells[0] for cell in cells]))
    return found


def checkpoint_strip(
    folder: Path,
    rows: Mapping[ItemKey, ManifestRow],
    checkpoints: Sequence[str],
    *,
    prompts: int,
    scores: Mapping[ItemKey, float] | None = None,
) -> tuple[list[GridRow], list[str]]:
    """Rows and column titles of a grid: prompts down, checkpoints across, from the same noise.

    Args:
        folder: of the manifest.
        rows: the manifest.
        checkpoints: names of the models, in the order of their steps, the base first; of many, some
            are shown, the first and the last among them.
        prompts: rows at most.
        scores: written under the images.
    """
    columns = evenly_spaced_with_ends(checkpoints, _MOST_CHECKPOINTS)
    places = list(dict.fromkeys((prompt, seed) for _, prompt, seed in rows))
    return grid_rows(folder, rows, columns, spread_items(places, prompts), scores), columns


def differences(scores: Mapping[ItemKey, float], baseline: str, model: str) -> dict[Place, float]:
    """Score of the model minus that of the baseline, by prompt id and seed, where both are."""
    return {
        (prompt, seed): scores[model, prompt, seed] - score
        for (of, prompt, seed), score in scores.items()
        if of == baseline and (model, prompt, seed) in scores
    }
