"""The console of a job: a bar with rate and time left, and libraries that do not talk over it.

Without a terminal the bar is a line now and then, for a log file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 20.0


def in_bytes(count: int) -> str:
    """A number of bytes for people, such as `1.3 GB`: thousands of thousands, as disks count."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def in_time(seconds: float) -> str:
    """A duration for people, such as `3 min`, in two digits at most."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} s"


@contextmanager
def progress(
    console: Console, title: str, total: int, *, unit: str = "images"
) -> Iterator[Callable[[int], None]]:
    """Show how far a job is.

    Args:
        console: where to; without a terminal, plain lines.
        title: names what advances.
        total: how many items there are.
        unit: what they are.

    Yields:
        A function to be told how many more items are done.
    """
    started = last_line = time.monotonic()
    done = 0
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task(title, total=total, rate="")

    def advance(count: int) -> None:
        nonlocal done, last_line
        done += count
        now = time.monotonic()
        rate = done / max(now - started, 1e-9)
        bar.update(task, advance=count, rate=f"{rate:.1f} {unit}/s")
        if not console.is_terminal and (now - last_line > _SECONDS_BETWEEN_LINES or done >= total):
            last_line = now
            left = max(total - done, 0) / rate
            console.print(f"{title}: {done}/{total} {unit}, {rate:.1f} {unit}/s, {left:.0f} s left")

    with bar:
        yield advance


def silence_libraries() -> None:
    """Turn off the bars and repeated warnings of diffusers and transformers while weights load.

    The bar of `datasets`, whose first look at a large set takes long, stays on a terminal.
    """
    import datasets
    import diffusers
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
