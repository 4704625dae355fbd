"""What tests of runs share: the context of a run, what it leaves behind, and its sudden end."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from diffalign.files import read_json_lines

SCRIPTS = Path(__file__).parents[1] / "scripts"


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


def forget_accelerate() -> None:
    """Forget the precision of the last run: accelerate keeps one per process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def figures(output: Path) -> list[dict[str, float]]:
    """What a run logged."""
    return read_json_lines(output / "metrics.jsonl")


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder but the locks of who wrote there, by its path from there."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name[-5:] != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def run_script(name: str, *arguments: object) -> None:
    """Run a file of scripts/ as `python scripts/NAME ...` does, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPTS / name), *map(str, arguments)])
        patch.syspath_prepend(SCRIPTS)
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code  # typer ends even what went well
