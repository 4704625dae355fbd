"""Ends a run as nothing can be prepared for: SIGKILL at a moment that a test names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_PATIENCE = 180.0


def kill_when(config: Path, moment: Callable[[], bool], *, resume: bool = False) -> None:
    """Start `diffalign train` and kill it as soon as the moment has come.

    Args:
        config: of the run.
        moment: asked every few milliseconds.
        resume: with `--resume`.
    """
    command = [sys.executable, "-m", "diffalign", "train", str(config)]
    log = config.with_suffix(".log")
    with log.open("a") as file:
        process = subprocess.Popen(
            [*command, "--resume"] if resume else command,
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + _PATIENCE
        while not moment() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.003)
        ended = process.poll()
        process.kill()
        process.wait()
    assert ended is None, f"the run ended by itself:\n{log.read_text()}"
    assert moment(), f"the moment never came:\n{log.read_text()}"


def step_reached(output: Path, step: int) -> bool:
    """Whether a run with `training.log_every=1` has made so many optimiser steps."""
    metrics = output / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return any(json.loads(line)["step"] >= step for line in lines if line.endswith("}"))
