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


def test_the_design_is_told_in_a_hundred_and_twenty_lines_besides_the_listing():
    before, _, rest = (ROOT / "docs/architecture.md").read_text().partition("<!-- listing")
    told = before + rest.partition("<!-- end of listing -->")[2]
    assert len(told.splitlines()) <= 120
