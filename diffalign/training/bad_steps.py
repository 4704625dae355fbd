"""Steps whose loss or gradient was not finite: found on the device, and told when it is read.

A step that is not finite leaves weights, optimiser state and weight average as they were, and its
figures are not counted. All of that is decided on the device. The host learns of it where it reads
figures anyway: at the end of a logging interval, before a checkpoint, and when a run stops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BadStep:
    """One step that was not finite."""

    step: int
    """Its number; the first step of a run is 1."""
    sample_ids: Sequence[str]
    """What this rank's part of it held."""
    in_a_row: int
    """How many such steps came one after the other, up to this one."""
    in_all: int
    """How many there were in the run, up to this one."""


class BadSteps:
    """Counts of a run, as of the last reading, and what has not been read since."""

    def __init__(self) -> None:
        self.in_all = 0
        self.in_a_row = 0
        self._unread: list[tuple[int, Tensor, Sequence[str]]] = []

    def note(self, step: int, good: Tensor, sample_ids: Sequence[str]) -> None:
        """Keep, without reading it, whether a step was finite on every rank.

        Args:
            step: its number.
            good: bool scalar, the same on every rank.
            sample_ids: of this rank.
        """
        self._unread.append((step, good, sample_ids))

    def read(self) -> Iterator[BadStep]:
        """The bad ones of the noted steps, in their order; each is counted as it is given.

        One read-back, at the first.
        """
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        found = torch.stack([good for _, good, _ in unread]).tolist()
        for (step, _, sample_ids), good in zip(unread, found, strict=True):
            if good:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            self.in_all += 1
            yield BadStep(step, sample_ids, self.in_a_row, self.in_all)
