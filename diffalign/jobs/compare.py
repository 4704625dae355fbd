"""`diffalign compare`: win rates between models, paired by prompt and seed, and a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.markup import escape

from diffalign import commands
from diffalign import config as configs
from diffalign.comparison.compare import Comparison, Place, compare_scores
from diffalign.comparison.page import Section, command, settings_list, write_report
from diffalign.comparison.report import (
    Result,
    as_json,
    as_markdown,
    console_table,
    contradictions,
    gallery_sections,
    grid_section,
    numbers_section,
)
from diffalign.comparison.score import SCORES, scores_by_item
from diffalign.errors import ConfigError, DataError
from diffalign.files import write_atomically, write_image
from diffalign.generation.manifest import ItemKey, ManifestRow, read_manifest, seeds_side_by_side
from diffalign.imaging.grid import render_grid
from diffalign.intervals import Bootstrap
from diffalign.jobs import score
from diffalign.processes import only_writer
from diffalign.ranges import AtLeast, Between, Ranged


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Ranged):
    """Which models of a folder are compared, by which scores."""

    images: Path
    """Folder that `generate` and `score` filled."""
    baseline: str | None = None
    """The model that the others are held against; null is the first of the manifest."""
    models: tuple[str, ...] = ()
    """The others; empty takes all."""
    scorers: tuple[str, ...] = ()
    """Names of the columns in `scores/`; empty takes all."""
    tie_tolerance: Annotated[float, AtLeast(0)] = 0.0
    """Scores that differ by at most this much are a tie, in units of the score."""
    confidence: Annotated[float, Between(0, 1, without=[0, 1])] = 0.95
    """Of the intervals."""
    resamples: Annotated[int, AtLeast(100)] = 10_000
    """Of the bootstrap."""
    seed: int = 0
    """Of the bootstrap."""
    grid_rows: Annotated[int, AtLeast(1)] = 8
    """Prompts in the grid."""
    gallery: Annotated[int, AtLeast(0)] = 6
    """How many of the biggest wins, and of the biggest losses, the report shows."""
    output: Path | None = None
    """Folder for the results; null is the folder of the images."""


def run(config: CompareConfig) -> list[Result]:
    """Compare, print, and write `compare.json`, `summary.md`, `comparison.png` and `report.html`.

    Returns:
        One result per scorer and model, in the order printed.

    Raises:
        BusyError: another process compares into the same folder.
    """
    if not config.images.is_dir():  # the lock would create it
        raise DataError(f"{config.images}: there is no such folder")
    with only_writer(config.output or config.images, of="compare"):
        return _run(config, Console(highlight=False))


def _run(config: CompareConfig, console: Console) -> list[Result]:
    rows = {row.key: row for row in read_manifest(config.images)}
    baseline, models = _choose_models(config, list(dict.fromkeys(model for model, _, _ in rows)))
    scores = _read_scores(config)
    console.print(
        f"[bold]compare[/bold]  {', '.join(models)} against {baseline} by "
        f"{escape(', '.join(scores))}; pairs by prompt and seed, "
        f"{config.resamples} resamples of whole prompts",
        soft_wrap=True,
    )
    results = [
        Result(
            scorer=scorer,
            baseline=baseline,
            model=model,
            comparison=_compare(config, rows, column, baseline, model),
        )
        for scorer, column in scores.items()
        for model in models
    ]
    for result in results:
        console.print(console_table(result))
        for line in result.warnings:
            console.print(f"  [yellow]{escape(line)}", soft_wrap=True)
    for line in contradictions(results):
        console.print(f"[yellow]{escape(line)}", soft_wrap=True)
    written = _write(config, results, rows, next(iter(scores.values())))
    console.print(f"[green]Done:[/green] {escape(', '.join(map(str, written)))}", soft_wrap=True)
    console.print(f"Next: open {written[0]} in a browser", markup=False, soft_wrap=True)
    return results


def _choose_models(config: CompareConfig, known: list[str]) -> tuple[str, list[str]]:
    baseline = config.baseline or known[0]
    models = list(config.models) or [model for model in known if model != baseline]
    for name in (baseline, *models):
        if name not in known:
            raise ConfigError(
                f"{config.images} has no images of a model named {name!r} "
                f"(models: {', '.join(known)})"
            )
    if not models or baseline in models:
        raise ConfigError(
            f"{config.images}: a comparison needs a baseline and at least one other model "
            f"(models: {', '.join(known)})"
        )
    return baseline, models


def _read_scores(config: CompareConfig) -> dict[str, dict[ItemKey, float]]:
    """Columns by name: scores by model, prompt id and seed."""
    folder = config.images / SCORES
    known = sorted(path.stem for path in folder.glob("*.jsonl"))
    if not known:
        raise DataError(
            f"{folder}: there are no scores yet; first run\n{score.suggestion(config.images)}"
        )
    for name in config.scorers:
        if name not in known:
            raise ConfigError(f"{folder} has no column {name!r} (columns: {', '.join(known)})")
    return {
        name: scores_by_item(config.images, folder / f"{name}.jsonl")
        for name in config.scorers or known
    }


def _compare(
    config: CompareConfig,
    rows: Mapping[ItemKey, ManifestRow],
    scores: Mapping[ItemKey, float],
    baseline: str,
    model: str,
) -> Comparison:
    def of(name: str) -> dict[Place, float]:
        return {(prompt, seed): s for (owner, prompt, seed), s in scores.items() if owner == name}

    expected = [(prompt, seed) for owner, prompt, seed in rows if owner in (baseline, model)]
    try:
        return compare_scores(
            of(baseline),
            of(model),
            expected=expected,
            tie_tolerance=config.tie_tolerance,
            confidence=config.confidence,
            resamples=config.resamples,
            seed=config.seed,
        )
    except ValueError as error:
        raise DataError(f"{config.images}: {model} against {baseline}: {error}") from error


def _write(
    config: CompareConfig,
    results: Sequence[Result],
    rows: Mapping[ItemKey, ManifestRow],
    scores: Mapping[ItemKey, float],
) -> list[Path]:
    """Write everything; the report comes first in the response."""
    output = config.output or config.images
    output.mkdir(parents=True, exist_ok=True)
    page, grid = output / "report.html", output / "comparison.png"
    summary, figures = output / "summary.md", output / "compare.json"
    saved = output / "compare.yaml"
    configs.save(config, saved)
    first = results[0]
    models = (first.baseline, *dict.fromkeys(result.model for result in results))
    places = list(dict.fromkeys((prompt, seed) for _, prompt, seed in rows))
    generated, columns = seeds_side_by_side(
        config.images, rows, models, places, prompts=config.grid_rows, scores=scores
    )
    write_image(grid, render_grid(generated, columns))
    bootstrap = Bootstrap(confidence=config.confidence, resamples=config.resamples)
    settings = {**configs.to_dict(config), "interval": f"{bootstrap.describe} of prompts"}
    write_atomically(figures, as_json(results, settings))
    write_atomically(summary, as_markdown(results, grid.name))
    write_report(
        page,
        f"{', '.join(models[1:])} against {first.baseline}",
        numbers_section(results),
        grid_section(generated, columns),
        *gallery_sections(
            first,
            config.images,
            rows,
            scores,
            count=config.gallery,
            tie_tolerance=config.tie_tolerance,
        ),
        Section("Settings", settings_list(_settings(config, rows))),
        Section("How to repeat it", command(_commands(config, results, saved))),
        lead="Both images of every pair were generated from the same prompt and the same noise.",
    )
    return [page, grid, summary, figures]


def _settings(config: CompareConfig, rows: Mapping[ItemKey, ManifestRow]) -> dict[str, object]:
    sampler = next(iter(rows.values())).sampler
    fingerprints = {row.model: row.fingerprint for row in rows.values()}
    return {
        **{f"weights of {name}": value for name, value in fingerprints.items()},
        **{name: "default" if value is None else value for name, value in sampler.items()},
        "tie tolerance": config.tie_tolerance,
        "resamples": config.resamples,
    }


def _commands(config: CompareConfig, results: Sequence[Result], saved: Path) -> str:
    scorers = dict.fromkeys(result.scorer for result in results)
    return "\n".join(
        [
            commands.command("generate", config=config.images / "generate.yaml"),
            *(
                commands.command("score", config=config.images / SCORES / f"{s}.yaml")
                for s in scorers
            ),
            commands.command("compare", config=saved),
        ]
    )
