"""Running means kept on the device: nothing is read back until a logging interval ends."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffalign import world
from diffalign.training.figures import Figure, Subset


class Metrics:
    """Sums and counts per name, over micro-batches, steps and finally ranks.

    Figures of a step wait until the device knows whether the step is good: one NaN must not blank
    an interval.
    """

    def __init__(self) -> None:
        self._pending: list[dict[str, Tensor]] = []
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Figure]) -> None:
        """Take the figures of a micro-batch."""
        self._pending.append({name: _sum_and_count(value) for name, value in values.items()})

    def commit(self, good: Tensor) -> None:
        """Count what was added since the last commit, or forget it.

        Args:
            good: whether it counts, a bool scalar on the device of the figures or on the CPU.
        """
        for sums in self._pending:
            for name, pair in sums.items():
                counted = torch.where(good, pair, 0.0)
                self._sums[name] = self._sums[name] + counted if name in self._sums else counted
        self._pending.clear()

    def reduce(self) -> dict[str, float]:
        """Means over everything committed on all ranks since the last call; starts afresh.

        Every rank must have committed the same names; one of which no rank has a value is left out.
        One reduction, one read-back.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        sums = world.total(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums.clear()
        found = zip(names, sums, strict=True)
        return {name: total / count for name, (total, count) in found if count}

    def state_dict(self) -> dict[str, Tensor]:
        """The committed sums of this rank."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Continue from committed sums of this rank."""
        self._sums = {name: pair.to(device) for name, pair in state.items()}


def _sum_and_count(value: Figure) -> Tensor:
    if isinstance(value, Subset):
        values = value.values.detach().float()
        return torch.stack([torch.where(value.counted > 0, values, 0.0).sum(), value.counted.sum()])
    value = value.detach().float()
    return torch.stack([value.sum(), torch.full_like(value.sum(), value.numel())])
