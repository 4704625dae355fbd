"""Exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
