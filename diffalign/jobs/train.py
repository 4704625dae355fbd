"""`diffalign train CONFIG.yaml`: align a model with preferences; the config says everything."""

from __future__ import annotations

import re
import resource
import shlex
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape

from diffalign import config, world
from diffalign.commands import command
from diffalign.console import silence_libraries
from diffalign.data.layout import Layout
from diffalign.data.loader import told_of_lost_workers
from diffalign.data.section import COUNTED_CAPTIONS
from diffalign.data.skipping import forget_skipped
from diffalign.errors import BusyError, ConfigError, ModelError, TrainingError
from diffalign.heartbeat import Heartbeat
from diffalign.jobs.trained import results_of_weights
from diffalign.models.diffusion.conditioning import cut_prompts
from diffalign.models.diffusion.kohya import KOHYA_FILE
from diffalign.processes import only_writer
from diffalign.training import build, checkpoint
from diffalign.training.card import write_cards
from diffalign.training.checkpoint import StartingPoint
from diffalign.training.checks import check
from diffalign.training.config import RunConfig
from diffalign.training.describe import plan
from diffalign.training.identity import identity, layout_of
from diffalign.training.reference import describe_visits
from diffalign.training.trainer import Trainer

PREVIEWED = 4
"""How many pairs a dry run decodes and shows."""


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
    silence_libraries()
    console = Console(highlight=False)
    check(run_config)
    _check_start(run_config, resume)
    if dry_run:
        with suppress(BusyError), only_writer(run_config.output):
            pass  # it can be written, by this process or the one that holds it
        _print_plan(console, run_config, processes)
        _print_source(console, run_config)
        console.print("[green]All checks passed; nothing was trained.")
        console.print("Start it with the same command without --dry-run")
        return None

    with ExitStack() as stack:  # the main rank holds the folder for all
        heartbeat = stack.enter_context(Heartbeat())
        accelerator = build.build_accelerator(run_config)
        heartbeat.meet()
        console = Console(highlight=False, quiet=not accelerator.is_main_process)
        world.decided(lambda: stack.enter_context(only_writer(run_config.output)))
        start = world.decided(lambda: _starting_point(run_config, resume))
        for line in start.notes:
            console.print(f"[yellow]{escape(line)}", soft_wrap=True)
        layout = _layout(run_config, start.path, console)
        final = _train(run_config, layout, accelerator, console, start.path)
    build.end(accelerator)
    return final


def _layout(run_config: RunConfig, start: Path | None, console: Console) -> Layout:
    """How samples are shared among the processes of now; says it where that is not as written."""
    saved = None if start is None else checkpoint.identity_of(start)
    layout = layout_of(run_config, saved)
    if layout.accumulation != run_config.training.accumulation:
        console.print(
            f"This run started on {layout.processes} processes. On {world.size()} of them "
            f"training.accumulation is {layout.accumulation}, so that an optimiser step stays "
            f"{layout.samples_per_step} samples, the same ones",
            soft_wrap=True,
        )
    return layout


def _train(
    run_config: RunConfig,
    layout: Layout,
    accelerator: Accelerator,
    console: Console,
    start: Path | None,
) -> Path | None:
    _print_plan(console, run_config, world.size(), layout)
    skipped = run_config.output / "skipped.jsonl"
    if accelerator.is_main_process:
        checkpoint.clear_unfinished(run_config.output)
        if start is None:
            forget_skipped(skipped)
    accelerator.wait_for_everyone()
    source = build.build_source(run_config, console, skipped=skipped, layout=layout)
    captions = source.captions(COUNTED_CAPTIONS)
    visits = describe_visits(run_config, source, layout)
    _print_lines(console, [*source.describe(), *visits, *_cut_captions(run_config, captions)])
    trainer = build.build_trainer(run_config, accelerator, source, console, layout=layout)
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
    if not complete:
        _print_stopped(console, run_config, trainer)
    return final


def _print_stopped(console: Console, run_config: RunConfig, trainer: Trainer) -> None:
    """Say why a run ended before its last step, and how it goes on."""
    config_file, further = run_config.output / "config.yaml", {}
    why = f"Stopped on request after step {trainer.step}, saved. Continue with"
    if trainer.stopped_for:
        further = {"training.health": "warn"}
        why = (
            f"Stopped after step {trainer.step} by training.health, saved: {trainer.stopped_for} "
            f"All the same it goes on with"
        )
    again = command("train", further, config=config_file, options=["--resume"])
    console.print(f"{why}\n  {again}", markup=False, soft_wrap=True)


def _fit(trainer: Trainer, run_config: RunConfig) -> bool:
    try:
        with told_of_lost_workers(run_config.section.reader):
            return trainer.fit()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the device ran out of memory at step {trainer.step}: lower "
            f"training.samples_per_device (and raise training.accumulation as much), set "
            f"model.gradient_checkpointing, or train a LoRA{run_config.section.savings}. What "
            f"was saved can be resumed"
        ) from error


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
    console.print(peak_memory(trainer.accelerator.device), soft_wrap=True)
    console.print(
        f"Publish it:\n  hf upload USER/NAME {escape(shlex.quote(str(final)))}", soft_wrap=True
    )
    return final


def peak_memory(device: torch.device) -> str:
    """How much memory a run took at its fullest, to be compared with `diffalign plan`."""
    if device.type == "cuda":
        size = torch.cuda.max_memory_allocated(device)
        return f"Peak memory: {size / 2**30:.2f} GiB of tensors on the device"
    return f"Peak memory: {_peak_kilobytes() / 2**20:.2f} GiB of this process"


def _peak_kilobytes() -> int:
    """Of this process, as the kernel has it: Linux's `ru_maxrss` begins with what the process held
    that started this one."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
        raise ConfigError(
            f"{resume}: there is no run to resume. Give the folder of one, or leave out "
            f"--resume to start it"
        )


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
    """Print what a dry run can say of the batches to come."""
    shown = run_config.section.preview(build.source_request(run_config, console), PREVIEWED)
    _print_lines(console, [*shown.lines, *_cut_captions(run_config, shown.captions)])
    for table in shown.tables:
        console.print(table)
    for warning in shown.warnings:
        console.print(f"[yellow]{escape(warning)}", soft_wrap=True)
    if shown.refusal is not None:
        raise shown.refusal


def _cut_captions(run_config: RunConfig, captions: Sequence[str]) -> list[str]:
    """How many of the first captions are longer than the text encoders read."""
    if not captions:
        return []
    try:
        tokenizers = run_config.model.tokenizers()
    except ModelError as error:
        return [f"captions: how many are too long is not known, as {error}"]
    return [cut_prompts(tokenizers, captions).describe()] if tokenizers else []


def _print_plan(
    console: Console, run_config: RunConfig, processes: int, layout: Layout | None = None
) -> None:
    accumulation = None if layout is None else layout.accumulation
    for heading, text in plan(run_config, processes, accumulation=accumulation):
        console.print(f"[bold]{heading:<11}[/bold] {escape(text)}", soft_wrap=True)


def _flat_scalars(run_config: RunConfig) -> dict[str, str | int | float | bool]:
    flat = identity(run_config)
    return {k: v if isinstance(v, (str, int, float, bool)) else str(v) for k, v in flat.items()}
