"""`diffalign train CONFIG.yaml`: align a model with preferences; the config says everything."""

from __future__ import annotations

import dataclasses
import shlex
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffalign import config, world
from diffalign.commands import command
from diffalign.data.decoding import Size
from diffalign.data.loader import told_of_lost_workers
from diffalign.data.pairs.preview import PairPreviewRow, without_download
from diffalign.data.pairs.source import PairSource
from diffalign.data.responses.samples import ResponsePreviewRow
from diffalign.data.responses.source import ResponseSource
from diffalign.data.skipping import forget_skipped
from diffalign.data.source import AbstractSource, Preview
from diffalign.errors import ConfigError, DataError, ModelError, TrainingError
from diffalign.jobs.export import results_of_weights
from diffalign.jobs.quiet import quieten_libraries
from diffalign.models.diffusion.conditioning import cut_prompts
from diffalign.models.diffusion.kohya import KOHYA_FILE
from diffalign.processes import only_writer
from diffalign.training import build, checkpoint
from diffalign.training.card import write_cards
from diffalign.training.checkpoint import StartingPoint
from diffalign.training.checks import check
from diffalign.training.config import RunConfig
from diffalign.training.describe import plan
from diffalign.training.identity import identity
from diffalign.training.trainer import Trainer

PREVIEWED_PAIRS = 4
"""How many pairs a dry run decodes and shows."""
COUNTED_CAPTIONS = 1000
"""Captions whose length is looked at when a run starts."""
SHOWN_CHARACTERS = 60
"""How much of a prompt or a response it shows."""


def run(
    run_config: RunConfig,
    *,
    dry_run: bool = False,
    resume: Path | None = None,
    processes: int = 1,
) -> Path | None:
    """Train, or with `dry_run` stop after all checks.

    Args:
        run_config: the run.
        dry_run: read the data set's first rows, print the plan, load no weights.
        resume: a checkpoint folder, or the run folder for its newest checkpoint; a run that was
            killed before its first one starts again.
        processes: how many a dry run should reckon with; a real one counts them itself.

    Returns:
        The folder of the exported model; None for a dry run or an interrupted one.
    """
    quieten_libraries()
    console = Console(highlight=False)
    check(run_config)
    _check_start(run_config, resume)
    if dry_run:
        _print_plan(console, run_config, processes)
        _print_source(console, run_config)
        console.print("[green]All checks passed; nothing was trained.")
        console.print("Start it with the same command without --dry-run")
        return None

    accelerator = build.build_accelerator(run_config)
    console = Console(highlight=False, quiet=not accelerator.is_main_process)
    with ExitStack() as stack:  # the main rank holds the folder for all
        world.decided(lambda: stack.enter_context(only_writer(run_config.output)))
        start = world.decided(lambda: _starting_point(run_config, resume))
        for line in start.notes:
            console.print(f"[yellow]{escape(line)}", soft_wrap=True)
        return _train(run_config, accelerator, console, start.path)


def _train(
    run_config: RunConfig, accelerator: Accelerator, console: Console, start: Path | None
) -> Path | None:
    _print_plan(console, run_config, world.size())
    skipped = run_config.output / "skipped.jsonl"
    if accelerator.is_main_process:
        checkpoint.clear_unfinished(run_config.output)
        if start is None:
            forget_skipped(skipped)
    accelerator.wait_for_everyone()
    source = build.build_source(run_config, console, skipped=skipped)
    _print_lines(console, [*source.describe(), *_cut_captions(run_config, source)])
    trainer = build.build_trainer(run_config, accelerator, source, console)
    world.decided(lambda: checkpoint.check_room(run_config.output, trainer.least_checkpoint_bytes))
    if start is not None:
        trainer.resume(start, verified=True)
        console.print(f"Resumed from {escape(str(start))} at step {trainer.step}", soft_wrap=True)
    if accelerator.is_main_process:  # not earlier: a refused resume must leave the run as it was
        config.save(run_config, run_config.output / "config.yaml")
        accelerator.init_trackers(run_config.tracking.project, _flat_scalars(run_config))
    complete = _fit(trainer, run_config)
    _print_lines(console, source.describe_end())
    final = _finish(trainer, run_config, console) if complete else None
    accelerator.end_training()
    if not complete:
        again = command("train", config=run_config.output / "config.yaml", options=["--resume"])
        console.print(
            f"Stopped on request after step {trainer.step}, saved. Continue with\n  {again}",
            markup=False,
            soft_wrap=True,
        )
    return final


def _fit(trainer: Trainer, run_config: RunConfig) -> bool:
    try:
        with told_of_lost_workers("data" if run_config.responses is None else "responses"):
            return trainer.fit()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the device ran out of memory at step {trainer.step}: lower "
            f"training.samples_per_device (and raise training.accumulation as much), set "
            f"model.gradient_checkpointing, or train a LoRA{_further_savings(run_config)}. What "
            f"was saved can be resumed"
        ) from error


def _further_savings(run_config: RunConfig) -> str:
    """What else saves memory in a run of this family."""
    if run_config.responses is not None:
        return (
            ". Next to responses, likelihood.concatenated: false sends one view after the other, a "
            "lower "
            "model.positions_at_once makes fewer logits at once, and a lower responses.max_length "
            "leaves long responses out"
        )
    if run_config.rollouts is not None:
        return (
            ". If it was sampling, lower rollouts.prompts_per_batch or images_per_batch, and "
            "model.images_per_encoding, instead"
        )
    return ", or lower model.images_per_encoding"


def _finish(trainer: Trainer, run_config: RunConfig, console: Console) -> Path:
    final = run_config.output / "final"
    trainer.export(final)
    if trainer.accelerator.is_main_process:
        write_cards(run_config, results_of_weights(run_config.output, console))
    console.print(
        f"[green]Trained {trainer.step} steps; the model is in {escape(str(final))}[/green]\n"
        f"{escape(run_config.model.next_step(run_config.output))}",
        soft_wrap=True,
    )
    if (final / KOHYA_FILE).is_file():
        console.print(
            f"Use it in ComfyUI or A1111: copy {escape(str(final / KOHYA_FILE))} to their LoRAs",
            soft_wrap=True,
        )
    console.print(
        f"Publish it:\n  hf upload USER/NAME {escape(shlex.quote(str(final)))}", soft_wrap=True
    )
    return final


def _check_start(run_config: RunConfig, resume: Path | None) -> None:
    """Refuse to train over an existing run, and to resume where there is none."""
    output = run_config.output
    existing = checkpoint.checkpoints_in(output)
    if resume is None:
        if existing or checkpoint.holds_misnamed_checkpoint(output):
            name = existing[-1].name if existing else "a renamed checkpoint"
            raise ConfigError(
                f"{output} already holds a run with {name}: continue it with --resume, or choose "
                f"another folder with output=..."
            )
    elif not _is_checkpoint(resume) and not (
        checkpoint.checkpoints_in(resume)
        or checkpoint.holds_misnamed_checkpoint(resume)
        or (resume / "config.yaml").is_file()
    ):
        raise ConfigError(f"{resume}: there is no run to resume")


def _starting_point(run_config: RunConfig, resume: Path | None) -> StartingPoint:
    """The checkpoint to continue from, read once and found whole."""
    checkpoint.undo_replacement(run_config.output)
    _check_start(run_config, resume)  # another run may have come and gone in the meantime
    if resume is None:
        return StartingPoint(None, ())
    if _is_checkpoint(resume):
        return checkpoint.named_point(resume)
    return checkpoint.starting_point(resume)


def _is_checkpoint(path: Path) -> bool:
    return (path / checkpoint.STATE).is_file() or path.name.startswith(checkpoint.PREFIX)


def _print_lines(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _print_source(console: Console, run_config: RunConfig) -> None:
    """What a dry run can say of the batches to come."""
    data, responses = run_config.data, run_config.responses
    looked_at = dataclasses.replace(
        run_config,
        data=data and without_download(data),
        responses=responses and dataclasses.replace(responses, max_bad_fraction=1.0),
    )
    source = build.build_source(looked_at, console, skipped=None)
    if isinstance(source, PairSource):
        shown = source.preview(PREVIEWED_PAIRS)
        lines = [*shown.lines, *_cut_captions(run_config, source)]
        _print_preview(console, dataclasses.replace(shown, lines=lines))
        assert data is not None, "it is what it is a source of"
        _print_unusable(console, shown.rows, data.section, data.max_bad_fraction)
    elif isinstance(source, ResponseSource):
        assert responses is not None, "they are what it is a source of"
        previewed = source.preview(PREVIEWED_PAIRS)
        _print_responses(console, previewed)
        _print_unusable(console, previewed.rows, responses.section, responses.max_bad_fraction)
        source.stop_above(responses.max_bad_fraction)  # shown first: a run would end with it
    else:
        _print_lines(console, [*source.describe(), *_cut_captions(run_config, source)])


def _cut_captions(run_config: RunConfig, source: AbstractSource) -> list[str]:
    """How many of the first captions are longer than the text encoders read."""
    captions = source.captions(COUNTED_CAPTIONS)
    if not captions:
        return []
    try:
        tokenizers = run_config.model.tokenizers()
    except ModelError as error:
        return [f"captions: how many are too long is not known, as {error}"]
    return [cut_prompts(tokenizers, captions).describe()] if tokenizers else []


def _print_unusable(
    console: Console,
    rows: Sequence[PairPreviewRow] | Sequence[ResponsePreviewRow],
    section: str,
    most: float,
) -> None:
    """A warning where some of the rows shown cannot be used."""
    bad = sum(row.unusable is not None for row in rows)
    if bad:
        console.print(
            f"[yellow]{bad} of the {len(rows)} pairs shown cannot be used: a run stops once more "
            f"than {section}.max_bad_fraction = {most:g} of all are so",
            soft_wrap=True,
        )


def _print_preview(console: Console, shown: Preview[PairPreviewRow]) -> None:
    _print_lines(console, shown.lines)
    table = Table("pair", "prompt", "chosen (h, w)", "rejected (h, w)", box=None)
    for row in shown.rows:
        sides = [_described(row.chosen), _described(row.rejected)]
        table.add_row(*map(escape, (row.sample_id[:24], row.prompt, *sides)))
    console.print(table)
    if shown.rows and all(row.unusable for row in shown.rows):
        raise DataError(
            f"none of the first {len(shown.rows)} pairs can be used, for example "
            f"{shown.rows[0].sample_id}: {shown.rows[0].unusable}. Fix the data, or the settings "
            f"under data that it depends on: path, columns, max_pixels"
        )


def _print_responses(console: Console, shown: Preview[ResponsePreviewRow]) -> None:
    _print_lines(console, shown.lines)
    for row in shown.rows:
        sizes = ", ".join(map(_described, row.images))
        table = Table("pair", escape(row.sample_id), box=None)
        table.add_row("images", escape(f"{len(row.images)}: {sizes}" if sizes else "0"))
        own = {f"prompt of {name}": text for name, text in row.own.items()}
        for name, text in {"prompt": row.prompt, **own, **row.responses}.items():
            table.add_row(name, escape(_shortened(text)))
        if row.unusable is not None:
            table.add_row("[yellow]skipped", escape(row.unusable))
        console.print(table)
    if shown.rows and all(row.unusable for row in shown.rows):
        raise DataError(
            f"none of the first {len(shown.rows)} pairs can be used, for example "
            f"{shown.rows[0].sample_id}: {shown.rows[0].unusable}. Fix the data, or the settings "
            f"under responses that it depends on: image_folder, columns, max_length"
        )


def _shortened(text: str) -> str:
    return textwrap.shorten(text, SHOWN_CHARACTERS, placeholder=" ...")


def _described(side: Size | str | None) -> str:
    if isinstance(side, tuple):
        return f"{side[0]} x {side[1]}"
    return side or "none"


def _print_plan(console: Console, run_config: RunConfig, processes: int) -> None:
    for heading, text in plan(run_config, processes):
        console.print(f"[bold]{heading:<11}[/bold] {escape(text)}", soft_wrap=True)


def _flat_scalars(run_config: RunConfig) -> dict[str, str | int | float | bool]:
    flat = identity(run_config)
    return {k: v if isinstance(v, (str, int, float, bool)) else str(v) for k, v in flat.items()}
