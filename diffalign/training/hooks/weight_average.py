"""Averages of the trained parameters: one that is kept here, and that of an optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffalign.training.hooks.base import AbstractHook, StepOutcome, TrainingRun


class WeightAverage(AbstractHook):
    """Follows the parameters: average <- decay * average + (1 - decay) * parameter.

    A step that left the weights as they were leaves the average as it was.
    """

    group: ClassVar[str] = "average"

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], *, decay: float) -> None:
        named = list(parameters)
        self._parameters = [parameter for _, parameter in named]
        self._names = [name for name, _ in named]
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        self._share = 1.0 - decay

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> Mapping[str, float]:
        self.update(outcome.moved)
        return {}

    @torch.no_grad()
    def update(self, moved: Tensor) -> None:
        """Take one step towards the current parameters, or none where they did not move.

        Args:
            moved: bool scalar on any device; it is not read.
        """
        share = moved.to(self._average[0].device) * self._share
        current = [parameter.detach() for parameter in self._parameters]
        torch._foreach_lerp_(self._average, current, [share] * len(current))

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by parameter name."""
        return dict(zip(self._names, self._average, strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from saved averages."""
        for name, average in zip(self._names, self._average, strict=True):
            average.copy_(state[name])


class AverageOfOptimizer(AbstractHook):
    """The average that an optimiser keeps, saved next to the weights for those who read a
    checkpoint; the optimiser's own state is what a run goes on from."""

    group: ClassVar[str] = "average"

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        averaged: Callable[[list[nn.Parameter]], list[Tensor]],
    ) -> None:
        named = list(parameters)
        self._parameters = [parameter for _, parameter in named]
        self._names = [name for name, _ in named]
        self._averaged = averaged

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by parameter name, after the last step."""
        return dict(zip(self._names, self._averaged(self._parameters), strict=True))

    @contextmanager
    def in_network(self) -> Iterator[None]:
        """Within this context the parameters are the averages; afterwards, bit for bit, what they
        were."""
        trained = [parameter.detach().clone() for parameter in self._parameters]
        self._fill(self._averaged(self._parameters))
        try:
            yield
        finally:
            self._fill(trained)

    @torch.no_grad()
    def _fill(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
