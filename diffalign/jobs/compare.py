"""`diffalign compare`: win rates between models, paired by prompt and seed, and a report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.markup import escape

from diffalign import commands
from diffalign import config as configs
from diffalign.comparison.compare import Comparison, Place, compare_scores
from diffalign.comparison.diversity import read_diversity
from diffalign.comparison.explorer import explorer_section
from diffalign.comparison.grids import FOLDER as GRIDS
from diffalign.comparison.grids import write_grids
from diffalign.comparison.judged import read_bias
from diffalign.comparison.report import (
    as_json,
    as_markdown,
    console_table,
    gallery_sections,
    grid_section,
    numbers_section,
)
from diffalign.comparison.results import CategoryResult, Result, contradictions
from diffalign.comparison.score import SCORES, scores_by_item
from diffalign.comparison.tables import (
    FigureTable,
    category_tables,
    diversity_table,
    pairs_table,
    position_table,
)
from diffalign.errors import ConfigError, DataError
from diffalign.evidence import holm, looks_at
from diffalign.files import read_json, write_atomically, write_image
from diffalign.generation.manifest import ItemKey, ManifestRow, read_manifest, seeds_side_by_side
from diffalign.generation.prompts import PromptsConfig, read_prompts
from diffalign.imaging.grid import render_grid
from diffalign.intervals import Bootstrap
from diffalign.jobs import score
from diffalign.pages.parts import Section, command, settings_list, write_report
from diffalign.parsing import checked
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
    pairs: Literal["all", "baseline"] = "all"
    """all: with more than two models each is held against each other one too; baseline: only
    against the baseline. P-values are corrected for as many comparisons as there are."""
    scorers: tuple[str, ...] = ()
    """Names of the columns in `scores/`; empty takes all."""
    tie_tolerance: Annotated[float, AtLeast(0)] = 0.0
    """Scores that differ by at most this much are a tie, in units of the score."""
    prompts: PromptsConfig | Path | None = None
    """A prompt file by whose categories results are reported; null takes those that the manifest
    has of its prompts."""
    rate_to_see: Annotated[float, Between(0.5, 1, without=[0.5, 1])] = 0.55
    """The win rate among decided pairs for which the report says how many prompts would show it."""
    confidence: Annotated[float, Between(0, 1, without=[0, 1])] = 0.95
    """Of the intervals."""
    resamples: Annotated[int, AtLeast(100)] = 10_000
    """Of the bootstrap."""
    seed: int = 0
    """Of the bootstrap."""
    grid_rows: Annotated[int, AtLeast(1)] = 8
    """Prompts in the grid."""
    gallery: Annotated[int, AtLeast(0)] = 6
    """How many of the biggest wins, and of the biggest losses, the report and `grids/` show."""
    output: Path | None = None
    """Folder for the results; null is the folder of the images."""


def run(config: CompareConfig) -> list[Result]:
    """Compare, print, and write `compare.json`, `summary.md`, `comparison.png` and `report.html`.

    Returns:
        One result per scorer and model against the baseline, in the order printed.

    Raises:
        BusyError: another process compares into the same folder.
    """
    if not config.images.is_dir():  # the lock would create it
        raise DataError(f"{config.images}: there is no such folder")
    with only_writer(config.output or config.images, of="compare"):
        return _run(config, Console(highlight=False))


def _run(config: CompareConfig, console: Console) -> list[Result]:
    rows = _with_categories(config, read_manifest(config.images))
    baseline, models = _choose_models(config, list(dict.fromkeys(model for model, _, _ in rows)))
    scores = _read_scores(config)
    console.print(
        f"[bold]compare[/bold]  {', '.join(models)} against {baseline} by "
        f"{escape(', '.join(scores))}; pairs by prompt and seed, "
        f"{config.resamples} resamples of whole prompts",
        soft_wrap=True,
    )
    every = _with_looks(config, _every_result(config, rows, scores, baseline, models))
    results = [result for result in every if result.baseline == baseline]
    tables = _tables(config, scores, every, results)
    categories = category_tables(results)
    for result in results:
        console.print(console_table(result))
        for line in result.warnings:
            console.print(f"  [yellow]{escape(line)}", soft_wrap=True)
        if result.plan is not None:
            console.print(f"  {escape(result.plan)}", soft_wrap=True)
    for table in (*tables, *categories):
        console.print(table.console())
        console.print(f"  {escape(table.explanation)}", soft_wrap=True)
    for line in contradictions(results):
        console.print(f"[yellow]{escape(line)}", soft_wrap=True)
    written = _write(config, every, tables, categories, rows, scores)
    console.print(f"[green]Done:[/green] {escape(', '.join(map(str, written)))}", soft_wrap=True)
    console.print(f"Next: open {written[0]} in a browser", markup=False, soft_wrap=True)
    return results


def _with_categories(
    config: CompareConfig, rows: Sequence[ManifestRow]
) -> dict[ItemKey, ManifestRow]:
    """The manifest by item, filed under the categories of the prompt file where one is given."""
    if config.prompts is None:
        return {row.key: row for row in rows}
    known = {prompt.text: prompt.categories for prompt in read_prompts(config.prompts)}
    if not any(known.get(row.prompt) for row in rows):
        raise ConfigError(
            f"prompts: none of its prompts with a category has an image in {config.images}: give "
            f"the file that they were generated from, and prompts.categories=[COLUMN] where it is "
            f"no published set"
        )
    return {row.key: replace(row, categories=known.get(row.prompt, {})) for row in rows}


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
            f"(models: {', '.join(known)}). Generate the same prompts with another model into this "
            f"folder and score them, or name two of these as baseline and models"
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


def _every_result(
    config: CompareConfig,
    rows: Mapping[ItemKey, ManifestRow],
    scores: Mapping[str, Mapping[ItemKey, float]],
    baseline: str,
    models: Sequence[str],
) -> list[Result]:
    """All models against the baseline, then among themselves; with p-values for all together."""
    pairs = [(baseline, model) for model in models]
    if config.pairs == "all":
        pairs += itertools.combinations(models, 2)
    found = [
        Result(
            scorer=scorer,
            baseline=first,
            model=second,
            comparison=_compare(config, rows, column, first, second),
            categories=_by_category(config, rows, column, first, second)
            if first == baseline
            else (),
        )
        for scorer, column in scores.items()
        for first, second in pairs
    ]
    tested = [result for result in found if result.comparison.prompts > 1]
    if len(tested) < 2:
        return found
    corrected = iter(holm([result.comparison.p_value for result in tested]))
    return [
        replace(result, holm=next(corrected)) if result.comparison.prompts > 1 else result
        for result in found
    ]


def _compare(
    config: CompareConfig,
    rows: Mapping[ItemKey, ManifestRow],
    scores: Mapping[ItemKey, float],
    baseline: str,
    model: str,
) -> Comparison:
    def of(name: str) -> dict[Place, float]:
        return {
            (prompt, seed): s
            for (owner, prompt, seed), s in scores.items()
            if owner == name and (owner, prompt, seed) in rows
        }

    expected = [(prompt, seed) for owner, prompt, seed in rows if owner in (baseline, model)]
    try:
        return compare_scores(
            of(baseline),
            of(model),
            expected=expected,
            tie_tolerance=config.tie_tolerance,
            rate_to_see=config.rate_to_see,
            confidence=config.confidence,
            resamples=config.resamples,
            seed=config.seed,
        )
    except ValueError as error:
        raise DataError(f"{config.images}: {model} against {baseline}: {error}") from error


def _by_category(
    config: CompareConfig,
    rows: Mapping[ItemKey, ManifestRow],
    scores: Mapping[ItemKey, float],
    baseline: str,
    model: str,
) -> tuple[CategoryResult, ...]:
    """Each category on its own; one whose images lack partners altogether is left out, and they
    are named as missing."""
    members: dict[tuple[str, str], dict[ItemKey, ManifestRow]] = {}
    for key, row in rows.items():
        for category in row.categories.items():
            members.setdefault(category, {})[key] = row
    return tuple(
        CategoryResult(
            kind=kind,
            category=category,
            comparison=_compare(config, of, scores, baseline, model),
        )
        for (kind, category), of in members.items()
        if _has_pairs(of, scores, baseline, model)
    )


def _has_pairs(
    rows: Mapping[ItemKey, ManifestRow],
    scores: Mapping[ItemKey, float],
    baseline: str,
    model: str,
) -> bool:
    there = rows.keys() & scores.keys()
    return any((model, prompt, seed) in there for m, prompt, seed in there if m == baseline)


def _with_looks(config: CompareConfig, results: Sequence[Result]) -> list[Result]:
    """Results that know how often the same comparison was made with fewer pairs."""
    path = (config.output or config.images) / "compare.json"
    before = _earlier_looks(path) if path.is_file() else {}
    found = []
    for result in results:
        items = result.comparison.items
        known = before.get(_names(result.scorer, result.baseline, result.model), [])
        seen = [count for count in known if count < items]
        found.append(replace(result, looks=looks_at([*seen, items], config.confidence)))
    return found


def _earlier_looks(path: Path) -> dict[tuple[str, ...], list[int]]:
    """Pairs of images at each look, by scorer and models, of an earlier `compare.json`."""
    found = {}
    try:
        content = read_json(path)
        for row in [*content["comparisons"], *content.get("pairs", [])]:
            names = _names(row["scorer"], row["baseline"], row["model"])
            found[names] = checked(list[int], row.get("looks", [row["items"]]), path)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: is no result of diffalign compare, which would replace it: move it away, or "
            f"give another output"
        ) from error
    return found


def _names(scorer: str, *models: str) -> tuple[str, ...]:
    return scorer, *sorted(models)


def _tables(
    config: CompareConfig,
    scores: Mapping[str, Any],
    every: Sequence[Result],
    results: Sequence[Result],
) -> list[FigureTable]:
    """What is shown right after the results."""
    found = []
    if len(every) > len(results):
        found += [pairs_table([r for r in every if r.scorer == scorer]) for scorer in scores]
    for scorer in scores:
        column = config.images / SCORES / f"{scorer}.jsonl"
        figures, bias = read_diversity(column), read_bias(column)
        found += [diversity_table(scorer, figures)] if figures else []
        found += [position_table(scorer, bias)] if bias else []
    return found


def _write(
    config: CompareConfig,
    every: Sequence[Result],
    tables: Sequence[FigureTable],
    categories: Sequence[FigureTable],
    rows: Mapping[ItemKey, ManifestRow],
    columns_of: Mapping[str, Mapping[ItemKey, float]],
) -> list[Path]:
    """Write everything; the report comes first in the response."""
    scores = next(iter(columns_of.values()))
    results = [result for result in every if result.baseline == every[0].baseline]
    others = [result for result in every if result.baseline != every[0].baseline]
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
    grids = write_grids(
        config.images,
        output / GRIDS,
        rows,
        models,
        scores,
        prompts=config.gallery,
        tie_tolerance=config.tie_tolerance,
    )
    bootstrap = Bootstrap(confidence=config.confidence, resamples=config.resamples)
    settings = {**configs.to_dict(config), "interval": f"{bootstrap.describe} of prompts"}
    write_atomically(figures, as_json(results, settings, others))
    lines = [line for table in (*tables, *categories) for line in (*table.markdown(), "")]
    write_atomically(summary, as_markdown(results, grid.name, lines[:-1]))
    write_report(
        page,
        f"{', '.join(models[1:])} against {first.baseline}",
        numbers_section(results),
        *(table.section() for table in tables),
        grid_section(generated, columns),
        *(table.section() for table in categories),
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
        explorer_section(
            config.images, page, rows, models, columns_of, tie_tolerance=config.tie_tolerance
        ),
        lead="Both images of every pair were generated from the same prompt and the same noise.",
    )
    return [page, grid, summary, figures, *grids]


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
