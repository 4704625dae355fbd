"""What looks at a run while it trains, and changes nothing of what it trains.

A run with hooks and one without end with the same weights, bit for bit: the loop keeps the random
generators away from them, and `inspecting` gives them the policy as it is. Every rank calls every
hook at the same steps; a hook that works on one rank alone must not wait for the others there.
"""

from __future__ import annotations

import abc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from diffalign.data.source import AbstractSource
from diffalign.models.base import AbstractTrainable
from diffalign.models.devices import evaluation_mode
from diffalign.models.sharding import reshard
from diffalign.objectives.base import AbstractObjective, Likelihoods
from diffalign.training.look_ahead import MicroBatch

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainingRun(Protocol):
    """The trainer, as far as a hook looks into it."""

    accelerator: Accelerator
    model: AbstractTrainable
    source: AbstractSource
    objective: AbstractObjective
    output: Path
    """The run folder."""
    console: Console
    """Silent on all ranks but the main one."""
    step: int
    """Optimiser steps that are done."""

    @property
    def optimizer_steps(self) -> int:
        """Those of the whole run."""

    @property
    def samples_per_step(self) -> int:
        """The effective batch, over all devices."""

    def views(self, part: MicroBatch) -> dict[str, Likelihoods]:
        """What policy and reference find of one batch."""

    def ask_to_stop(self, reason: str) -> None:
        """End the run with a checkpoint when the figures of this step are written; every rank must
        ask at the same step. The reason is a sentence for the user."""

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply the learning rates of all steps to come; every rank must call."""

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Within this context the network has the weights that the run is worth at this step,
        where they are not those that train."""


@dataclass(frozen=True)
class StepOutcome:
    """What one optimiser step came to."""

    moved: Tensor
    """Whether the weights moved: loss and gradient were finite on every rank. A bool scalar where
    the device found it out, so an `if` of it waits for the device."""
    complete: bool
    """Whether it was the last step of the run."""


class AbstractHook(abc.ABC):  # noqa: B024  # no moment is everybody's
    """Called by the loop at fixed moments; every method may be left as it is."""

    group: ClassVar[str] = ""
    """File of a checkpoint that holds `state_dict`, without its ending; empty for a hook without a
    state."""

    def start(self, run: TrainingRun) -> Mapping[str, float]:
        """The loop is about to begin, or to go on, after step `run.step`.

        Returns:
            As `after_step` does, of the policy before its first step; nothing when a run goes on.
        """
        return {}

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> Mapping[str, float]:
        """Step `run.step` is done.

        Returns:
            Figures for a row of `metrics.jsonl`, named at the same steps on every rank.
        """
        return {}

    def add_to_row(self, run: TrainingRun, row: Mapping[str, float]) -> Mapping[str, float]:
        """Figures are there, and not written yet; see `after_log`.

        Returns:
            What the row should hold besides, on every rank the same.
        """
        return {}

    def after_log(self, run: TrainingRun, row: Mapping[str, float]) -> None:
        """Figures are there: means of a logging interval, or what hooks returned, or both.

        Args:
            run: that trains.
            row: with `step`; the same on every rank.
        """
        return

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep, by name; the same on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` gave, before `start`; empty where the checkpoint has nothing.

        Raises:
            KeyError: the checkpoint lacks what the hook cannot do without.
        """
        return

    def end(self, run: TrainingRun) -> None:
        """The loop has ended: at the last step, on request, or by an error."""
        return


@dataclass(frozen=True, kw_only=True)
class AbstractHookSettings(abc.ABC):
    """A hook as a config writes it, in the list `hooks`; its module is its `kind`."""

    @abc.abstractmethod
    def open(self) -> AbstractHook:
        """The hook of one run."""


class Hooks:
    """All hooks of a run, called in their order."""

    def __init__(self, hooks: Sequence[AbstractHook]) -> None:
        self._hooks = tuple(hooks)
        groups = [hook.group for hook in hooks if hook.group]
        assert len(set(groups)) == len(groups), f"two hooks save into one file: {groups}"

    def start(self, run: TrainingRun) -> dict[str, float]:
        """The figures of all."""
        return self._gathered(lambda hook: hook.start(run))

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> dict[str, float]:
        """The figures of all."""
        return self._gathered(lambda hook: hook.after_step(run, outcome))

    def _gathered(self, call: Callable[[AbstractHook], Mapping[str, float]]) -> dict[str, float]:
        figures: dict[str, float] = {}
        with generators_kept():
            for hook in self._hooks:
                figures |= call(hook)
        return figures

    def add_to_row(self, run: TrainingRun, row: Mapping[str, float]) -> dict[str, float]:
        """The figures of all."""
        return self._gathered(lambda hook: hook.add_to_row(run, row))

    def after_log(self, run: TrainingRun, row: Mapping[str, float]) -> None:
        """See `AbstractHook`."""
        with generators_kept():
            for hook in self._hooks:
                hook.after_log(run, row)

    def end(self, run: TrainingRun) -> None:
        """See `AbstractHook`."""
        for hook in self._hooks:
            hook.end(run)

    def state_dicts(self) -> dict[str, dict[str, Tensor]]:
        """Groups of a checkpoint."""
        states = {hook.group: hook.state_dict() for hook in self._hooks if hook.group}
        return {group: state for group, state in states.items() if state}

    def load_state_dicts(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give each hook its group of a checkpoint.

        Raises:
            KeyError: see `AbstractHook.load_state_dict`.
        """
        for hook in self._hooks:
            if hook.group:
                hook.load_state_dict(groups.get(hook.group, {}))


@contextmanager
def generators_kept() -> Iterator[None]:
    """Afterwards the generators of Python, NumPy and torch are as they were: training draws the
    dropout of an adapter from the last one."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # the global one
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def inspecting(run: TrainingRun) -> Iterator[None]:
    """Within this context the policy computes without gradient or dropout, with the weights that
    its optimiser would give away, and without its wrapper for several processes, so that ranks need
    not call it equally often."""
    model = run.model
    wrapped = model.network
    if isinstance(wrapped, DistributedDataParallel):  # whose forward waits for the other ranks
        model.network = wrapped.module
    try:
        with torch.no_grad(), evaluation_mode(model.network), run.evaluated_weights():
            yield
    finally:
        reshard(model.network)
        model.network = wrapped
