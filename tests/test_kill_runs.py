"""A few of the trials of `scripts/kill_runs.py`; docs/log.md has a hundred."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/kill_runs.py"


@pytest.mark.slow
def test_runs_that_are_killed_and_whose_checkpoints_are_damaged_end_alike():
    command = [sys.executable, str(SCRIPT), "--trials", "3", "--seed", "1"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 of 3 runs ended alike" in ended.stdout
