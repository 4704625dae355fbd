"""A few of the trials of `scripts/faults.py`; docs/faults.md has two hundred."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/faults.py"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_jobs_that_are_killed_and_whose_checkpoints_are_damaged_end_alike():
    kinds = ["images", "generate", "synthesise", "ranks"]
    command = [sys.executable, str(SCRIPT), "--kills", "6", "--fills", "3", "--seed", "1"]
    command += ["--kinds", *kinds]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " jobs ended alike after " in ended.stdout
    assert "written twice" not in ended.stdout
