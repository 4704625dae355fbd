"""What benches share: the machine and its versions, growth exponents, and spreads of ratios."""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch

from diffalign import __version__, versions
from diffalign.intervals import Interval

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")


def machine() -> dict[str, Any]:
    """Hardware and versions, as every bench writes them next to its figures."""
    count = torch.cuda.device_count()
    return {
        "diffalign": __version__,
        "python": platform.python_version(),
        **{name: versions.library(name).installed for name in LIBRARIES},
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(count)],
    }


def on_this_machine(found: dict[str, Any]) -> str:
    """The same in one line, with a warning where these are not the figures of a GPU."""
    gpus = ", ".join(found["gpus"])
    device = gpus or f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads"
    line = f"{device}; torch {found['torch']}, diffusers {found['diffusers']}, transformers "
    line += f"{found['transformers']}, diffalign {found['diffalign']}"
    return line if gpus else f"{line}. Measured without a GPU: these are not the figures of one."


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", file.read_text()) if file.is_file() else None
    return found[1] if found else platform.machine()


def now() -> float:
    """Seconds of this process's CPU time; on a GPU of the clock, its work waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def exponent(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, Interval]:
    """The power of the size by which values grow, and its 95 % interval.

    A least-squares line through the logarithms; several values may be of one size. Where the values
    do not follow a power, as with a fixed part, that widens the interval.

    Args:
        sizes: greater than 0; three different ones at least.
        values: one for each, greater than 0.

    Raises:
        ValueError: fewer than three sizes differ.
    """
    if len(set(sizes)) < 3:
        raise ValueError(f"an exponent needs three different sizes, and there are {set(sizes)}")
    if len(set(values)) == 1:
        return 0.0, Interval(0.0, 0.0)
    fit = scipy.stats.linregress(np.log(sizes), np.log(values))
    half = float(scipy.stats.t.ppf(0.975, len(sizes) - 2)) * float(fit.stderr)
    return float(fit.slope), Interval(float(fit.slope) - half, float(fit.slope) + half)


def spread(ratios: Sequence[float]) -> str:
    """Median, and the smallest and largest of the rounds."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def rounded(value: float, digits: int = 3) -> float:
    """To so many significant digits."""
    return 0.0 if value == 0 else round(value, digits - 1 - math.floor(math.log10(abs(value))))
