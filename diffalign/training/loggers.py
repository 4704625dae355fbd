"""Where figures go: `metrics.jsonl` always, the screen, and trackers by config."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from diffalign.files import read_json_lines, write_json_lines


class JsonLines:
    """One JSON object a line, flushed line by line.

    `metrics.jsonl` holds only what a rerun reproduces; clock readings go to `timing.jsonl`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Mapping[str, float | int]) -> None:
        """Append one row."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def truncate_after(self, step: int) -> None:
        """Forget rows of steps that a resumed run will do again, and a half-written last line."""
        if not self.path.exists():
            return
        kept = [row for row in read_json_lines(self.path) if row["step"] <= step]
        write_json_lines(self.path, kept)


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

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
