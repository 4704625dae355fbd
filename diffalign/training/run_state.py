"""Everything of a run that a checkpoint holds: taken from a trainer, and given back to one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from diffalign import renames, world
from diffalign.data.source import AbstractSource
from diffalign.errors import CheckpointError
from diffalign.objectives.base import AbstractObjective
from diffalign.seeding import derive_seed
from diffalign.training.bad_steps import BadSteps
from diffalign.training.checkpoint import Checkpoint
from diffalign.training.hooks.base import Hooks
from diffalign.training.metrics import Metrics


class RunInProgress(Protocol):
    """What a checkpoint is made of: the trainer, as far as its state goes."""

    accelerator: Accelerator
    source: AbstractSource
    objective: AbstractObjective
    optimizer: AcceleratedOptimizer
    schedule: LRScheduler
    hooks: Hooks
    metrics: Metrics
    named_parameters: dict[str, nn.Parameter]
    identity: Mapping[str, Any]
    step: int
    bad_steps: BadSteps


def capture(trainer: RunInProgress) -> Checkpoint:
    """The state after the last step; every rank must call, the main one gets all ranks' parts."""
    metrics = {f"metrics/{name}": sums for name, sums in trainer.metrics.state_dict().items()}
    mine = {name: tensor.cpu() for name, tensor in {**random_state(), **metrics}.items()}
    ranks = gather_object([mine])
    optimizer, optimizer_values = pack_optimizer(trainer.optimizer)
    tensors: dict[str, Mapping[str, Tensor]] = {
        "weights": trainer.named_parameters,
        "optimizer": optimizer,
        **{f"rank-{number}": part for number, part in enumerate(ranks)},
        **trainer.hooks.state_dicts(),
    }
    if remembered := trainer.objective.state_dict():
        tensors["objective"] = remembered
    scaler = trainer.accelerator.scaler
    state = {
        "identity": trainer.identity,
        "bad_steps": trainer.bad_steps.in_all,
        "bad_in_a_row": trainer.bad_steps.in_a_row,
        "source": trainer.source.state_dict(),
        "schedule": trainer.schedule.state_dict(),
        "optimizer": optimizer_values,
        "loss_scaler": None if scaler is None else scaler.state_dict(),
    }
    return Checkpoint(step=trainer.step, tensors=tensors, state=state)


def restore(trainer: RunInProgress, saved: Checkpoint) -> None:
    """Put a freshly assembled trainer where `saved` was captured.

    Raises:
        CheckpointError: it has not what this trainer needs.
    """
    try:
        _restore(trainer, saved)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint of step {saved.step} does not fit this run "
            f"({type(error).__name__}: {error}): it was written by another version, or by hand. "
            f"Resume from another one, or start afresh in another output folder"
        ) from error


def _restore(trainer: RunInProgress, saved: Checkpoint) -> None:
    with torch.no_grad():
        for name, parameter in trainer.named_parameters.items():
            parameter.copy_(saved.tensors["weights"][name])
    unpack_optimizer(
        trainer.optimizer, saved.tensors.get("optimizer", {}), saved.state["optimizer"]
    )
    trainer.hooks.load_state_dicts(saved.tensors)
    trainer.objective.load_state_dict(saved.tensors.get("objective", {}))
    trainer.schedule.load_state_dict(saved.state["schedule"])
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(saved.state["loss_scaler"])
    trainer.source.load_state_dict(saved.state["source"])
    trainer.step = saved.step
    trainer.bad_steps.in_all = saved.state["bad_steps"]
    trainer.bad_steps.in_a_row = saved.state["bad_in_a_row"]
    _restore_rank(trainer, [saved.tensors[f"rank-{n}"] for n in range(_ranks_of(saved))])


def _ranks_of(saved: Checkpoint) -> int:
    """On how many processes a checkpoint was written."""
    return sum(re.fullmatch(r"rank-\d+", group) is not None for group in saved.tensors)


def _restore_rank(trainer: RunInProgress, ranks: Sequence[Mapping[str, Tensor]]) -> None:
    """Give this rank its generators and its part of the figures that are not written yet.

    On another number of processes generators start anew, in a way that depends on the step alone,
    and the main rank takes the figures of all.
    """
    if len(ranks) == world.size():
        restore_random_state(ranks[world.rank()])
        mine = [ranks[world.rank()]]
    else:
        torch.manual_seed(
            derive_seed(trainer.identity["seed"], "process", world.rank(), trainer.step)
        )
        mine = list(ranks) if world.is_main() else [_nothing_of(rank) for rank in ranks[:1]]
    sums: dict[str, Tensor] = {}
    for state in mine:
        for key, pair in state.items():
            head, _, name = key.partition("/")
            if head == "metrics":
                sums[name] = sums[name] + pair if name in sums else pair
    trainer.metrics.load_state_dict(sums, trainer.accelerator.device)


def _nothing_of(rank: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same names without a value: ranks must know the same figures."""
    return {name: torch.zeros_like(tensor) for name, tensor in rank.items()}


def random_state() -> dict[str, Tensor]:
    """This process's generators. Samples are data; what is left to these is LoRA dropout."""
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """Continue the generators of `random_state`."""
    torch.set_rng_state(state["rng.cpu"])
    if "rng.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng.cuda"])


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as named tensors and plain JSON values; mappings within the state of a
    parameter, as bitsandbytes has them, are told by a dot."""
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in packed["state"].items():
        for name, value in _flat(entries):
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    return tensors, {"scalars": scalars, "param_groups": packed["param_groups"]}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Give an optimiser the state that `pack_optimizer` took from its like."""
    state: dict[int, dict[str, Any]] = {}
    scalars = (
        (f"{index}.{name}", value)
        for index, entries in values["scalars"].items()
        for name, value in entries.items()
    )
    for key, value in (*scalars, *tensors.items()):
        index, *within, name = key.split(".")
        entries = state.setdefault(int(index), {})
        for part in within:
            entries = entries.setdefault(part, {})
        entries[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def refuse_other_run(path: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming the first key in which two runs differ.

    Args:
        path: the checkpoint, for the message.
        saved, ours: identities: flat mappings from dotted config keys to values; `saved` may have
            names from before they were changed.
    """
    saved = renames.current_identity(saved, ours)
    for key in sorted({*saved, *ours}):
        if saved.get(key) != ours.get(key):
            raise CheckpointError(
                f"{path}: this checkpoint belongs to another run: {key} was "
                f"{saved.get(key)!r} there and is {ours.get(key)!r} here. Resume with that "
                f"run's own config.yaml, or start afresh in another output folder"
            )
