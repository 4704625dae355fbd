"""The files of a round: latents, images, scores, and the steps to train on, each written whole.

Latents of a work are in one safetensors file as rows of one tensor, whatever their meaning; a
step says which row it leaves from and at which it arrives. Steps are read row by row, so a round
may be far larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from diffalign.data.batches import StepBatch
from diffalign.data.strength.base import Strength, stack_strengths
from diffalign.files import (
    inside,
    open_tensors,
    read_rows,
    write_atomically,
    write_json_lines,
    writing,
)

LATENTS = "latents"
"""Name of the tensor in a file of latents: float32 [rows, channels, h, w]."""
STEPS = "steps.jsonl"
"""The steps of a round."""


@dataclass(frozen=True, kw_only=True)
class StepPair:
    """One reverse step of two sides, as rows of a file of latents."""

    sample_id: str
    prompt: str
    file: str
    """Of latents, in the round's folder."""
    t: int
    t_next: int
    states: Mapping[str, int]
    """View -> the row that its step leaves from."""
    outcomes: Mapping[str, int]
    """View -> the row at which it arrives."""
    weight: float | None = None
    """How much the pair counts; None where all count alike."""
    preference: float | None = None
    """Probability that the chosen side is the preferred one; None where it certainly is."""

    def __post_init__(self) -> None:
        if not self.states or self.states.keys() != self.outcomes.keys():
            raise ValueError("states and outcomes must be of the same views, at least one")
        if min(*self.states.values(), *self.outcomes.values()) < 0:
            raise ValueError("rows of states and outcomes must be at least 0")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file, whole or not at all."""
    content = save({name: t.contiguous() for name, t in tensors.items()}, metadata=metadata)
    with writing(path):
        write_atomically(path, content)


def write_steps(folder: Path, steps: Iterable[StepPair]) -> None:
    """Write the steps of a round."""
    write_json_lines(folder / STEPS, map(asdict, steps))


def read_steps(folder: Path) -> list[StepPair]:
    """The steps of a round, in the order in which they were written."""
    return read_rows(StepPair, folder / STEPS)


def step_batch(folder: Path, steps: Sequence[StepPair]) -> StepBatch:
    """Read the latents of some steps; sides that leave from the same row share a state.

    Args:
        folder: of the round.
        steps: B of them, with the same views.
    """
    views = tuple(steps[0].states)
    places: dict[tuple[str, int], int] = {}  # file and row -> index among the batch's states
    owners: list[StepPair] = []  # whose prompt and time a state has
    rows: dict[str, list[int]] = {view: [] for view in views}
    for step in steps:
        for view in views:
            place = (step.file, step.states[view])
            if place not in places:
                places[place] = len(places)
                owners.append(step)
            rows[view].append(places[place])
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(open_tensors(inside(folder, name))).get_slice(LATENTS)
            for name in {step.file for step in steps}
        }
        return StepBatch(
            sample_ids=tuple(step.sample_id for step in steps),
            states=torch.stack([files[name][row] for name, row in places]),
            prompts=tuple(step.prompt for step in owners),
            t=torch.tensor([step.t for step in owners]),
            t_next=torch.tensor([step.t_next for step in owners]),
            state_rows={view: torch.tensor(rows[view]) for view in views},
            outcomes={
                view: torch.stack([files[step.file][step.outcomes[view]] for step in steps])
                for view in views
            },
            strength=stack_strengths(
                [Strength(preference=step.preference, weight=step.weight) for step in steps]
            ),
        )
