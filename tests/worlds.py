"""Runs on several numbers of processes, rank after rank in this one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest

from diffalign import world
from diffalign.data.layout import Layout
from diffalign.data.source import AbstractSource


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some optimiser steps of a run on some processes."""

    processes: int
    samples_per_device: int
    steps: int


def begin(monkeypatch: pytest.MonkeyPatch, stage: Stage, *, accumulation: int) -> Layout:
    """The layout of a run that starts with a stage."""
    monkeypatch.setattr(world, "size", lambda: stage.processes)
    return Layout.start(samples_per_device=stage.samples_per_device, accumulation=accumulation)


def states_of_ranks(
    monkeypatch: pytest.MonkeyPatch, sources: Sequence[AbstractSource]
) -> list[dict[str, Any]]:
    """The positions of sources of all ranks, which tell each other what they know."""
    said: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(world, "gather", lambda value: [said.append(value) or value])
        for source in sources:
            source.state_dict()
        patch.setattr(world, "gather", lambda value: said)
        return [source.state_dict() for source in sources]


def samples_of_steps(
    monkeypatch: pytest.MonkeyPatch,
    open_rank: Callable[[Layout], AbstractSource],
    stages: Sequence[Stage],
    *,
    accumulation: int,
    names: Callable[[Any], Sequence[Any]] = lambda batch: batch.sample_ids,
) -> list[list[Any]]:
    """What each optimiser step sees over all ranks, in the order of the endless sequence.

    Args:
        monkeypatch: of the test.
        open_rank: opens the source of the current rank.
        stages: each resumes where the one before was saved.
        accumulation: of the first stage; that of the others follows.
        names: what a batch is of.
    """
    start = begin(monkeypatch, stages[0], accumulation=accumulation)
    state: dict[str, Any] | None = None
    steps: list[list[Any]] = []
    for stage in stages:
        monkeypatch.setattr(world, "size", lambda stage=stage: stage.processes)
        layout = start.on_these_processes(stage.samples_per_device)
        ranks, sources = [], []
        for rank in range(stage.processes):
            monkeypatch.setattr(world, "rank", lambda rank=rank: rank)
            source = open_rank(layout)
            if state is not None:
                source.load_state_dict(state)
            batches = islice(iter(source), stage.steps * layout.accumulation)
            ranks.append([list(names(batch)) for batch in batches])
            sources.append(source)
        states = states_of_ranks(monkeypatch, sources)
        assert all(each == states[0] for each in states)
        state = json.loads(json.dumps(states[0]))
        in_order = [name for passes in zip(*ranks, strict=True) for part in passes for name in part]
        size = layout.samples_per_step
        assert len(in_order) == size * stage.steps
        steps += [in_order[i : i + size] for i in range(0, len(in_order), size)]
    return steps


ON_TWO = (Stage(processes=2, samples_per_device=2, steps=7),)
"""A run of seven steps that stays where it starts."""
MOVED = {
    "to one": (
        Stage(processes=2, samples_per_device=2, steps=3),
        Stage(processes=1, samples_per_device=2, steps=4),
    ),
    "to four": (
        Stage(processes=2, samples_per_device=2, steps=3),
        Stage(processes=4, samples_per_device=2, steps=4),
    ),
    "to four and back": (
        Stage(processes=2, samples_per_device=2, steps=2),
        Stage(processes=4, samples_per_device=1, steps=2),
        Stage(processes=1, samples_per_device=4, steps=1),
        Stage(processes=2, samples_per_device=2, steps=2),
    ),
}
"""The same run, resumed on other processes; with an accumulation of a multiple of two."""
