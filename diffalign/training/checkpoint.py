"""Checkpoints that survive anything: written aside, flushed, renamed; safetensors and JSON only.

A checkpoint folder holds one safetensors file per group of tensors (weights, optimizer, average,
one per rank) and `state.json`. It appears under its name only when complete, so a folder called
`checkpoint-N` is always whole, whatever was killed or filled up while it was written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import CheckpointError

PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after an optimiser step."""

    step: int
    """Optimiser steps done."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Group name -> tensors by name, on the CPU."""
    state: Mapping[str, Any]
    """Everything else: plain JSON values."""


def checkpoints_in(output: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    found = [path for path in output.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]))


def save_checkpoint(output: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint, then remove the oldest ones beyond `keep`, and later steps: they are
    those of a run that was resumed from before them, and so given up.

    Raises:
        CheckpointError: it could not be written; older checkpoints are untouched.
    """
    final = output / f"{PREFIX}{checkpoint.step}"
    partial = output / f".{final.name}.partial"
    try:
        _remove(partial)
        partial.mkdir(parents=True)
        for group, tensors in checkpoint.tensors.items():
            path = partial / f"{group}.safetensors"
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
            _flush(path)
        path = partial / "state.json"
        path.write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}))
        _flush(path)
        _remove(final)
        partial.rename(final)
        _flush(output)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = checkpoints_in(output)
        survivor = f"{kept[-1]} is intact" if kept else "there is no older one"
        free = shutil.disk_usage(output).free / 2**20 if output.is_dir() else 0.0
        raise CheckpointError(
            f"{final}: the checkpoint could not be written ({error}); {survivor}. "
            f"{free:.0f} MiB are free there: make room, or lower training.keep_checkpoints"
        ) from error
    existing = checkpoints_in(output)
    current = existing.index(final)
    for old in [*existing[: max(0, current + 1 - keep)], *existing[current + 1 :]]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        CheckpointError: there is none, or a file of it is damaged.
    """
    if not (path / "state.json").is_file():
        raise CheckpointError(f"{path}: not a checkpoint: it has no state.json")
    try:
        state = json.loads((path / "state.json").read_text())
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        others = [str(other) for other in checkpoints_in(path.parent) if other != path]
        hint = f"; resume from {others[-1]} instead" if others else ""
        raise CheckpointError(f"{path}: the checkpoint is damaged ({error}){hint}") from error
    return Checkpoint(step=state.pop("step"), tensors=tensors, state=state)


def discard_partial(output: Path) -> None:
    """Remove what a killed process left half-written."""
    for partial in output.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as named tensors and plain JSON values."""
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in packed["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    return tensors, {"scalars": scalars, "param_groups": packed["param_groups"]}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Give an optimiser the state that `pack_optimizer` took from its like."""
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entries) for index, entries in values["scalars"].items()
    }
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})


def random_state() -> dict[str, Tensor]:
    """This process's generators. Draws are data; what is left to these is LoRA dropout."""
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """Continue the generators of `random_state`."""
    torch.set_rng_state(state["rng.cpu"])
    if "rng.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng.cuda"])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
