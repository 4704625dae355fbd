"""`diffalign best-checkpoint RUN`: which of a run's checkpoints to use, by what they generate.

Generates the same prompts from the same noise with the base and every kept checkpoint, scores and
compares them, and names the one of the highest win rate. Every part is a command of its own; what
is there already is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffalign import components
from diffalign import config as configs
from diffalign.commands import command
from diffalign.comparison.checkpoints import (
    Measured,
    best_of,
    drift_from,
    render_curve,
    section_of,
    sentences,
    warnings_by_others,
)
from diffalign.comparison.diversity import Distance, feature_distance, pixel_distance
from diffalign.comparison.grids import checkpoint_strip
from diffalign.comparison.report import percent
from diffalign.errors import ConfigError
from diffalign.files import write_image, write_json, writing
from diffalign.generation.manifest import read_manifest
from diffalign.generation.models import ModelSpec, base_of_run
from diffalign.generation.prompts import PromptsConfig
from diffalign.generation.text_to_image import DtypeName, SamplerConfig
from diffalign.imaging.grid import GridRow, render_grid
from diffalign.jobs import compare, generate, score
from diffalign.models.runs import is_run, model_of_run
from diffalign.pages.parts import Section, settings_list, write_report
from diffalign.pages.parts import command as command_line
from diffalign.ranges import AtLeast, Between, Ranged
from diffalign.scorers.base import AbstractScorer
from diffalign.scorers.images import AbstractImageScorer
from diffalign.training.checkpoint import checkpoints_in

_STRIP_ROWS = 8
"""Prompts of the strip."""
BASE = "base"
"""Name of the model that a run started from."""


@dataclass(frozen=True, kw_only=True)
class BestCheckpointConfig(Ranged):
    """Which checkpoints are compared, on what, and by whom."""

    run: Path
    """Folder of a training run of an image model; `training.keep_checkpoints` says how many
    checkpoints there are to choose from."""
    prompts: PromptsConfig | Path
    """A prompt file, or the keys of a choice of prompts. None of them should be trained on, and
    none should be used to report how good the named checkpoint is: it was chosen by them."""
    scorer: AbstractScorer
    """Of images, higher is better: `kind: pickscore`, clip, jpeg, or one of your own."""
    watch: Mapping[str, AbstractScorer] = field(default_factory=dict)
    """Further scorers by names of your own, which choose nothing: where the chosen checkpoint is
    worse than the base by one of them, that is said."""
    steps: tuple[Annotated[int, AtLeast(1)], ...] = ()
    """Which checkpoints, by their optimiser steps; empty takes all that the run kept."""
    seeds: Annotated[int, AtLeast(1)] = 4
    """Images of every prompt, for each model."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How they are generated."""
    batch_size: Annotated[int, AtLeast(1)] = 4
    """Images generated at once."""
    dtype: DtypeName = "auto"
    """Of the weights; auto is fp16 on a GPU and float32 elsewhere."""
    device: str = "auto"
    """A torch device; auto takes a GPU where there is one."""
    confidence: Annotated[float, Between(0, 1, without=[0, 1])] = 0.95
    """Of the intervals."""
    output: Path | None = None
    """Folder for images and results; null is `checkpoints` in the folder of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = components.kind_of(self.scorer).rpartition(".")[2]
        if kind in self.watch:
            raise ValueError(
                f"watch names a scorer {kind}, which is the name of the one that chooses: give the "
                f"other one another name"
            )


def run(config: BestCheckpointConfig) -> tuple[Measured, list[Measured]]:
    """Generate, score, compare, and name the checkpoint to use.

    Writes `checkpoints.json`, `curve.png`, `strip.png` and `checkpoints.html`, next to what
    `generate`, `score` and `compare` write.

    Returns:
        The checkpoint that is named, and all of them, in the order of their steps.

    Raises:
        ConfigError: the folder is no run of an image model, or has not two checkpoints.
    """
    console = Console(highlight=False)
    checkpoints = _checkpoints(config)
    output = config.output or config.run / "checkpoints"
    models: dict[str, ModelSpec | str] = {BASE: base_of_run(config.run)}
    models |= {_name(step): str(path) for step, path in checkpoints.items()}
    generate.run(
        generate.GenerateConfig(
            models=models,
            prompts=config.prompts,
            seeds=config.seeds,
            sampler=config.sampler,
            batch_size=config.batch_size,
            dtype=config.dtype,
            device=config.device,
            output=output,
        )
    )
    column = score.ScoreConfig(images=output, scorer=config.scorer, device=config.device)
    columns = [column] + [
        score.ScoreConfig(images=output, scorer=scorer, name=name, device=config.device)
        for name, scorer in config.watch.items()
    ]
    for each in columns:
        score.run(each)
    chooser = column.column().stem
    results = compare.run(
        compare.CompareConfig(
            images=output,
            baseline=BASE,
            models=tuple(models)[1:],
            scorers=(chooser, *config.watch),
            confidence=config.confidence,
            gallery=0,
            pairs="baseline",
        )
    )
    scorer, drift_by = config.scorer, "pixels"
    distance: Distance = pixel_distance
    if isinstance(scorer, AbstractImageScorer) and scorer.has_features:
        drift_by = f"features of {components.kind_of(scorer)}"
        distance = feature_distance(scorer.features)
    drift = drift_from(output, read_manifest(output), BASE, distance)
    compared = {r.model: r.comparison for r in results if r.scorer == chooser}
    measured = [
        Measured(
            step=step,
            checkpoint=path,
            drift=drift[_name(step)],
            drift_by=drift_by,
            comparison=compared[_name(step)],
        )
        for step, path in checkpoints.items()
    ]
    best = best_of(measured)
    watched = {
        name: {
            step: r.comparison
            for step in checkpoints
            for r in results
            if (r.scorer, r.model) == (name, _name(step))
        }
        for name in config.watch
    }
    said = sentences(best, measured) + warnings_by_others(best, watched, scorer=chooser)
    _write(config, output, measured, best, said)
    _print(console, output, measured, best, said)
    return best, measured


def _name(step: int) -> str:
    return f"step-{step}"


def _checkpoints(config: BestCheckpointConfig) -> dict[int, Path]:
    """The folders of the checkpoints to compare, by step, in order."""
    run = config.run
    if not is_run(run):
        raise ConfigError(
            f"{run}: is not the folder of a training run (it has no config.yaml): give the "
            f"`output` of a diffalign train"
        )
    kind = str(model_of_run(run).get("kind"))
    if kind == "vlm":
        raise ConfigError(
            f"{run}: trained responses, and best-checkpoint compares images. Evaluate its "
            f"checkpoints one by one: diffalign evaluate --help lists the benchmarks"
        )
    kept = {int(path.name.rpartition("-")[2]): path for path in checkpoints_in(run)}
    for step in config.steps:
        if step not in kept:
            raise ConfigError(
                f"steps names {step}, and {run} has no checkpoint of that step (it has "
                f"{', '.join(map(str, kept)) or 'none'})"
            )
    chosen = {step: path for step, path in kept.items() if not config.steps or step in config.steps}
    if len(chosen) < 2:
        raise ConfigError(
            f"{run}: there is nothing to choose from (steps of the checkpoints that it kept: "
            f"{', '.join(map(str, kept)) or 'none'}; that are asked for: "
            f"{', '.join(map(str, config.steps)) or 'all'}). Train with "
            f"training.checkpoint_every=N and training.keep_checkpoints=10"
        )
    return chosen


def _next_command(best: Measured) -> str:
    return command("export", config=best.checkpoint)


def _write(
    config: BestCheckpointConfig,
    output: Path,
    measured: Sequence[Measured],
    best: Measured,
    said: Sequence[str],
) -> None:
    curve = render_curve(measured, best)
    with writing(output):
        configs.save(config, output / "checkpoints.yaml")
        write_image(output / "curve.png", curve)
        write_image(output / "strip.png", render_grid(*_strip(output, measured)))
        write_json(
            output / "checkpoints.json",
            {
                "step": best.step,
                "checkpoint": str(best.checkpoint),
                "says": list(said),
                "next": _next_command(best),
                "checkpoints": [_plain(each) for each in measured],
            },
        )
        write_report(
            output / "checkpoints.html",
            f"Checkpoints of {config.run.name}",
            section_of(measured, best, curve, said),
            Section("Settings", settings_list(_settings(config, measured))),
            Section(
                "What next",
                command_line(_next_command(best)),
                command_line(command("best-checkpoint", config=output / "checkpoints.yaml")),
            ),
            lead="Base and checkpoints generated the same prompts from the same noise.",
        )


def _strip(output: Path, measured: Sequence[Measured]) -> tuple[list[GridRow], list[str]]:
    rows = {row.key: row for row in read_manifest(output)}
    models = [BASE, *(_name(each.step) for each in measured)]
    return checkpoint_strip(output, rows, models, prompts=_STRIP_ROWS)


def _plain(each: Measured) -> Mapping[str, object]:
    low, high = each.bounds
    comparison = each.comparison
    return {
        "step": each.step,
        "checkpoint": str(each.checkpoint),
        "drift": each.drift,
        "drift_by": each.drift_by,
        "win_rate": each.win_rate,
        "win_rate_interval": [low, high],
        "won_tied_lost": [comparison.wins, comparison.ties, comparison.losses],
        "mean_score": comparison.model_mean,
        "mean_score_of_base": comparison.baseline_mean,
    }


def _settings(config: BestCheckpointConfig, measured: Sequence[Measured]) -> dict[str, object]:
    comparison = measured[0].comparison
    return {
        "run": config.run,
        "prompts": comparison.prompts,
        "pairs of images": comparison.items,
        "seeds": config.seeds,
        "steps of the sampler": config.sampler.steps,
        "guidance": config.sampler.guidance,
    }


def _print(
    console: Console,
    output: Path,
    measured: Sequence[Measured],
    best: Measured,
    said: Sequence[str],
) -> None:
    level = f"{best.comparison.confidence:.0%} interval"
    shown = Table("step", "drift", "win rate, ties as half", level, "mean score", box=None)
    for each in measured:
        shown.add_row(
            f"{each.step}{' *' if each is best else ''}",
            f"{each.drift:.4f}",
            percent(each.win_rate),
            each.interval,
            f"{each.comparison.model_mean:.3f}",
        )
    console.print(shown)
    for line in said:
        console.print(line, markup=False, soft_wrap=True)
    page = escape(str(output / "checkpoints.html"))
    console.print(f"[green]Done:[/green] {page}", soft_wrap=True)
    console.print(f"Next:\n  {_next_command(best)}", markup=False, soft_wrap=True)
