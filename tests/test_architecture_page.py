"""The listing of docs/architecture.md is that of the package."""

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
