"""docs/architecture.md: its listing is that of the package, and it stays short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_listing_is_that_of_the_package():
    made = subprocess.run(
        [sys.executable, "scripts/list_modules.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr


def test_the_design_is_told_in_two_hundred_lines():
    assert len((ROOT / "docs/architecture.md").read_text().splitlines()) <= 200
