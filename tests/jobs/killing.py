"""Ends a run as nothing can be prepared for: SIGKILL at a moment that a test names."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

from tests.processes import ended, started


def kill_when(config: Path, moment: Callable[[], bool], *, resume: bool = False) -> None:
    """Run `diffalign train`, which is killed as soon as the moment has come.

    Args:
        config: of the run.
        moment: see `started`.
        resume: with `--resume`.
    """
    log = config.with_suffix(".log")
    flags = ["--resume"] if resume else []
    with started("train", str(config), *flags, log=log, moment=moment) as process:
        assert ended(process, log) == -signal.SIGKILL, f"ended by itself:\n{log.read_text()}"
    assert moment(), f"the moment never came:\n{log.read_text()}"


def step_reached(output: Path, step: int) -> bool:
    """Whether a run with `training.log_every=1` has made so many optimiser steps."""
    metrics = output / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return any(json.loads(line)["step"] >= step for line in lines if line.endswith("}"))
