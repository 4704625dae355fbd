"""Where figures go: `metrics.jsonl` always, the screen, and trackers by config."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from diffalign.errors import DataError
from diffalign.files import append_json_lines, write_json_lines
from diffalign.parsing import parse_json
from diffalign.training.hooks.base import AbstractHook, StepOutcome, TrainingRun


class Records(AbstractHook):
    """Writes what a run says of itself, on the main rank, and shows how far it is."""

    def __init__(self, output: Path, console: Console) -> None:
        """Args:
        output: the run folder.
        console: silent on all ranks but the main one.
        """
        self._metrics = JsonLines(output / "metrics.jsonl")
        self._timing = JsonLines(output / "timing.jsonl")
        self._output, self._console = output, console
        self._started = time.monotonic()
        self._progress: TrainingProgress | None = None

    def start(self, run: TrainingRun) -> Mapping[str, float]:
        kept = run.step or -1  # what is known before the first step is told anew
        if run.accelerator.is_main_process:
            for file in (self._metrics, self._timing):
                if dropped := file.truncate_after(kept):
                    self._console.print(
                        f"[yellow]{escape(str(file.path))} was damaged: {dropped} lines that are "
                        f"no rows are dropped",
                        soft_wrap=True,
                    )
        self._progress = TrainingProgress(
            self._console,
            total=run.optimizer_steps,
            start=run.step,
            unit_per_step=run.samples_per_step,
        )
        return {}

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> Mapping[str, float]:
        if self._progress is not None:
            self._progress.advance(run.step)
        return {}

    def after_log(self, run: TrainingRun, row: Mapping[str, float]) -> None:
        if self._progress is None or not run.accelerator.is_main_process:
            return
        timing = {
            "step": run.step,
            "seconds": time.monotonic() - self._started,
            "samples_per_second": self._progress.samples_per_second,
            "network_rows": run.model.evaluations,
        }
        if torch.cuda.is_available():
            timing["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        try:
            self._metrics.write(row)
            self._timing.write(timing)
        except OSError as error:  # as with a checkpoint: room may be made, and the run goes on
            self._console.print(
                f"[red]{escape(str(self._output))}: the figures of step {run.step} could not "
                f"be written ({error}). The run goes on",
                soft_wrap=True,
            )
        run.accelerator.log({**row, **timing}, step=run.step)
        self._progress.figures(run.step, row)

    def end(self, run: TrainingRun) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class JsonLines:
    """One JSON object a line, flushed line by line.

    `metrics.jsonl` holds only what a rerun reproduces; clock readings go to `timing.jsonl`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row, and wait for the disk: a checkpoint must not outlive the rows before."""
        append_json_lines(self.path, [row])

    def truncate_after(self, step: int) -> int:
        """Forget rows of steps that a resumed run will do again, and a half-written last line.

        Returns:
            How many whole lines were no rows and are dropped as well.
        """
        if not self.path.exists():
            return 0
        *lines, _unfinished = self.path.read_bytes().split(b"\n")
        found = [_row(line) for line in lines]
        rows = [row for row in found if row is not None]
        write_json_lines(self.path, [row for row in rows if row["step"] <= step])
        return len(found) - len(rows)


def _row(line: bytes) -> dict[str, Any] | None:
    """What a line says, if it is an object with a step."""
    try:
        row = parse_json(line, "a row")
    except DataError:
        return None
    numbered = isinstance(row, dict) and isinstance(row.get("step"), (int, float))
    return row if numbered else None


class TrainingProgress:
    """Bar with rate, time left and the last figures; plain lines where there is no terminal."""

    def __init__(self, console: Console, *, total: int, start: int, unit_per_step: int) -> None:
        self._console = console
        self._unit_per_step = unit_per_step
        self._total = total
        self._step = start
        self._timed_from: tuple[int, float] | None = None
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=start, rate="", figures="")

        self._bar.start()

    def stop(self) -> None:
        """Take the bar away."""
        self._bar.stop()

    @property
    def samples_per_second(self) -> float:
        """Mean rate of this process after its first step, in samples over all ranks."""
        if self._timed_from is None or self._timed_from[0] == self._step:
            return 0.0
        start, began = self._timed_from
        return (self._step - start) * self._unit_per_step / (time.monotonic() - began)

    def advance(self, step: int) -> None:
        """One more optimiser step is done."""
        self._step = step
        if self._timed_from is None:  # the first step starts workers and warms up: not a rate
            self._timed_from = (step, time.monotonic())
        rate = f"{self.samples_per_second:.1f} samples/s"
        self._bar.update(self._task, completed=step, rate=rate)

    def figures(self, step: int, row: Mapping[str, float]) -> None:
        """Show the means of a logging interval."""
        parts = [f"{label} {row[name]:{spec}}" for name, label, spec in SHOWN if name in row]
        parts += [
            f"{name.removesuffix('/accuracy')} accuracy {value:.0%}"
            for name, value in row.items()
            if name.endswith("/accuracy")
        ]
        shown = "  ".join(parts)
        self._bar.update(self._task, figures=shown)
        if not self._console.is_terminal:
            rate = self.samples_per_second
            left = (self._total - step) * self._unit_per_step / rate if rate else 0.0
            timing = f"{rate:.1f} samples/s  {_clock(left)} left" if rate else ""
            self._console.print(
                f"step {step}/{self._total}  {shown}  {timing}",
                highlight=False,
                soft_wrap=True,
            )


SHOWN = (
    ("loss", "loss", ".4f"),
    ("accuracy", "accuracy", ".0%"),
    ("drift/chosen", "chosen", "+.1e"),
    ("drift/rejected", "rejected", "+.1e"),
    ("clipped", "clipped", ".0%"),
    ("abs_log_ratio", "|log-ratio|", ".1e"),
    ("flipped", "flipped", ".0%"),
)
"""Metric, label and format of what the progress line shows, besides the accuracy of each term of a
sum; the file has all of them."""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
