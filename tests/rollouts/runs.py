"""The context that a test's run gives its source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from diffalign.data.layout import Layout
from diffalign.data.source import AbstractSource
from diffalign.rollouts.base import RunContext


def row_metadata(folder: Path, **changes: Any) -> RunContext:
    """A silent run of one row a batch and one batch a step, without a model or data.

    Args:
        folder: of all rounds.
        changes: other values of its fields; or `samples_per_device` and `accumulation`, for the
            layout of a run that starts with them.
    """
    run = RunContext(
        folder=folder,
        run_seed=0,
        model=None,
        settings="",
        layout=Layout.start(
            samples_per_device=changes.pop("samples_per_device", 1),
            accumulation=changes.pop("accumulation", 1),
        ),
        process=None,
        console=Console(quiet=True),
        open_data=_no_data,
    )
    return replace(run, **changes)


def _no_data(views: frozenset[str]) -> AbstractSource:
    raise AssertionError("no data is needed")
