"""`diffalign generate`: draw prompts x seeds with every model, from the same noise."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from diffalign import config as configs
from diffalign.console import progress
from diffalign.errors import DiffalignError
from diffalign.files import write_image
from diffalign.generation.chosen_images import grid_rows, spread_items
from diffalign.generation.generate import (
    Failure,
    Item,
    Subject,
    draw_batches,
    existing_rows,
    missing_batches,
    plan_batches,
)
from diffalign.generation.manifest import MANIFEST, ItemKey, ManifestRow, read_manifest
from diffalign.generation.pipelines import (
    DtypeName,
    LocatedModel,
    ModelSpec,
    SamplerConfig,
    TextToImage,
    choose_dtype,
    locate_model,
    sampler_settings,
)
from diffalign.generation.prompts import PromptsConfig, read_prompts
from diffalign.imaging.grid import draw_grid
from diffalign.jobs import generate_groups, score
from diffalign.jobs.quiet import quieten_libraries
from diffalign.models.devices import choose_device
from diffalign.models.runs import in_words
from diffalign.processes import only_writer
from diffalign.rollouts.groups import GROUPS, GroupsConfig

_LISTED_FAILURES = 10


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which models draw what, how, and where to."""

    models: dict[str, ModelSpec | str]
    """Name -> where the model lies: a diffusers folder, a hub id, a `.safetensors` checkpoint, a
    training run's folder, or these and more as keys. The name becomes a folder and a column."""
    prompts: PromptsConfig | Path
    """A prompt file, or the keys of a choice of prompts."""
    output: Path
    """Folder for pictures and manifest; what it already holds is kept and completed."""
    seeds: int | tuple[int, ...] = 1
    """How many pictures a prompt gets (seeds 0, 1, ...), or the seeds themselves."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The same for all models."""
    batch_size: int = 4
    """Pictures drawn at once; changes nothing but speed, memory and float rounding."""
    dtype: DtypeName = "auto"
    """Of the weights; auto is fp16 on a GPU and float32 elsewhere."""
    device: str = "auto"
    """A torch device; auto takes a GPU where there is one."""
    grid: bool = False
    """Draw `grid.png`: prompts down, models across."""
    grid_rows: int = 8
    """How many prompts the grid shows."""
    grid_columns: tuple[str, ...] = ()
    """Which models the grid shows, in this order; empty shows all."""
    trajectories: GroupsConfig | None = None
    """Draw groups of images for people to rank, with the trajectories that training on their
    ranking needs, in place of single pictures; of one model, a group for each prompt and seed."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models must name at least one model, as models.base=PATH")
        for name in self.models:
            if not re.fullmatch(r"\w[\w.+-]*", name):
                raise ValueError(
                    f"models: the name {name!r} becomes a folder: use letters, digits, - _ . +"
                )
        if not self.seed_numbers():
            raise ValueError("seeds must be at least 1, or a list of at least one seed")
        if len(set(self.seed_numbers())) < len(self.seed_numbers()):
            raise ValueError(f"seeds repeat a seed: {list(self.seed_numbers())}")
        if self.batch_size < 1 or self.grid_rows < 1:
            raise ValueError("batch_size and grid_rows must be at least 1")
        unknown = [name for name in self.grid_columns if name not in self.models]
        if unknown:
            raise ValueError(
                f"grid_columns names {unknown[0]!r}, which is none of the models "
                f"({', '.join(self.models)})"
            )
        if self.trajectories is not None and len(self.models) != 1:
            raise ValueError(
                f"trajectories are drawn by the one model that training goes on from, and models "
                f"names {len(self.models)}: {', '.join(self.models)}"
            )
        if self.trajectories is not None and self.sampler != SamplerConfig():
            raise ValueError(
                "sampler and trajectories exclude each other: steps, guidance and eta of "
                "trajectories are those of trajectories.process"
            )

    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds, whichever way they were given."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


def run(config: GenerateConfig) -> None:
    """Draw what is missing, list it, and draw the grid if asked to.

    Raises:
        BusyError: another process writes in the folder.
        DiffalignError: at the end, if pictures failed; all others are safe, and the same command
            tries the failed ones again.
    """
    console = Console(highlight=False)
    quieten_libraries()
    with only_writer(config.output):
        if config.trajectories is not None:
            _run_groups(console, config, config.trajectories)
        else:
            _run_single(console, config)


def _run_single(console: Console, config: GenerateConfig) -> None:
    """Draw single images."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    texts = read_prompts(config.prompts)
    batches = plan_batches(texts, config.seed_numbers(), config.batch_size)
    models = {name: locate_model(_spec(model)) for name, model in config.models.items()}
    for model in models.values():
        model.check_sampler(config.sampler)
    settings = sampler_settings(config.sampler, dtype)
    subjects = {
        name: Subject(name, model.fingerprint(), settings) for name, model in models.items()
    }
    existing = existing_rows(config.output, subjects.values())
    pending = {name: missing_batches(batches, name, existing) for name in models}

    _announce(console, config, len(texts), pending, f"{device}, {settings['dtype']}")
    for name, model in models.items():
        path = Path(_spec(config.models[name]).path).expanduser()
        said = [f"is {in_words(path)}"] if in_words(path) != str(path) else []
        for note in [*said, *model.notes()]:
            console.print(f"  {name}: {note}", markup=False, soft_wrap=True)
    config.output.mkdir(parents=True, exist_ok=True)
    configs.save(config, config.output / "generate.yaml")
    failures = {
        name: _draw(console, config, model, subjects[name], pending[name], existing)
        for name, model in models.items()
        if pending[name]
    }
    items = [item for batch in batches for item in batch]
    grid = _grid(config, items) if config.grid else None
    _conclude(console, config, grid, failures)


def _spec(model: ModelSpec | str) -> ModelSpec:
    return ModelSpec(path=model) if isinstance(model, str) else model


def _announce(
    console: Console,
    config: GenerateConfig,
    prompt_count: int,
    pending: dict[str, list[list[Item]]],
    place: str,
) -> None:
    sampler, seeds = config.sampler, len(config.seed_numbers())
    console.print(
        f"[bold]generate[/bold]  {prompt_count} prompts x {seeds} seeds x {len(pending)} models, "
        f"{sampler.steps} steps, guidance {sampler.guidance:g}, "
        f"{sampler.scheduler or 'own'} scheduler, batches of {config.batch_size}, {place}",
        soft_wrap=True,
    )
    console.print("Safety checker and watermark are off; weights come from safetensors only.")
    for name, batches in pending.items():
        left = sum(map(len, batches))
        done = prompt_count * seeds - left
        console.print(f"  {name}: {left} to draw" + (f", {done} already there" if done else ""))


def _draw(
    console: Console,
    config: GenerateConfig,
    model: LocatedModel,
    subject: Subject,
    batches: Sequence[list[Item]],
    existing: dict[ItemKey, ManifestRow],
) -> list[Failure]:
    """Draw one model's share, alone on the device."""
    device = choose_device(config.device)
    artist = TextToImage.open(
        model, config.sampler, device=device, dtype=choose_dtype(config.dtype, device)
    )
    texts = dict.fromkeys(item.prompt.text for batch in batches for item in batch)
    cut = artist.truncated(texts)
    if cut:
        console.print(
            f"  {subject.name}: {len(cut)} prompts are longer than its text encoder reads, "
            f"their ends are ignored, e.g. {cut[0][:60]!r}",
            markup=False,
            soft_wrap=True,
        )
    with progress(console, subject.name, sum(map(len, batches))) as advance:
        failures = draw_batches(config.output, subject, artist, batches, existing, advance)
    del artist
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return failures


def _grid(config: GenerateConfig, items: Sequence[Item]) -> Path:
    columns = config.grid_columns or tuple(config.models)
    rows = {row.key: row for row in read_manifest(config.output)}
    chosen = spread_items([(item.prompt.prompt_id, item.seed) for item in items], config.grid_rows)
    path = config.output / "grid.png"
    write_image(path, draw_grid(grid_rows(config.output, rows, columns, chosen), columns))
    return path


def _conclude(
    console: Console,
    config: GenerateConfig,
    grid: Path | None,
    failures: dict[str, list[Failure]],
) -> None:
    out = config.output
    written = [f"pictures in {out / 'images'}", f"list {out / MANIFEST}", *_named(grid)]
    console.print(f"[green]Done:[/green] {escape(', '.join(written))}", soft_wrap=True)
    _raise_failures(
        "pictures",
        [f"{n}: {_in_words(failure)}" for n, found in failures.items() for failure in found],
    )
    console.print(f"Next:\n{score.suggestion(out)}", markup=False, soft_wrap=True)


def _run_groups(console: Console, config: GenerateConfig, settings: GroupsConfig) -> None:
    """Draw groups in place of single pictures."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    prompts = read_prompts(config.prompts)
    items = [Item(prompt, seed) for prompt in prompts for seed in config.seed_numbers()]
    plan = generate_groups.plan(
        _spec(next(iter(config.models.values()))),
        settings,
        items,
        output=config.output,
        batch_size=config.batch_size,
        dtype=dtype,
    )
    config.output.mkdir(parents=True, exist_ok=True)
    configs.save(config, config.output / "generate.yaml")
    failures = generate_groups.draw(console, plan, output=config.output, device=device, dtype=dtype)
    grid = None
    if config.grid:
        grid = generate_groups.draw_groups_grid(config.output, items, rows=config.grid_rows)
    out = config.output
    written = [f"groups {out / GROUPS}", f"pictures in {out / 'images'}", *_named(grid)]
    console.print(f"[green]Done:[/green] {escape(', '.join(written))}", soft_wrap=True)
    _raise_failures("groups", [_in_words(failure) for failure in failures])
    console.print(
        generate_groups.next_step(out, plan.model, settings.process), markup=False, soft_wrap=True
    )


def _in_words(failure: Failure) -> str:
    item = failure.item
    return f"{item.prompt.text[:60]!r}, seed {item.seed}: {failure.reason}"


def _raise_failures(what: str, lines: Sequence[str]) -> None:
    """Raise with the first few, if there are any."""
    if lines:
        more = len(lines) - _LISTED_FAILURES
        shown = [*lines[:_LISTED_FAILURES], *([f"and {more} more"] if more > 0 else [])]
        first = f"{len(lines)} {what} failed; run the same command again to retry them:"
        raise DiffalignError("\n  ".join([first, *shown]))


def _named(grid: Path | None) -> Iterable[str]:
    return () if grid is None else (f"grid {grid}",)
