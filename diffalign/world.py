"""The processes that train together; without a process group, a world of one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=1)
"""How long a rank waits for the others: sampling a round can take hours, and not every rank is
equally fast. The default of ten minutes would end the run. Those that are gone are noticed
otherwise: `heartbeat`."""


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _grouped() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _grouped() else 1


def is_main() -> bool:
    """Whether this process writes files and speaks to the user."""
    return rank() == 0


def total(values: Tensor) -> Tensor:
    """Elementwise sum over ranks, on every rank; the input is not changed."""
    result = values.detach().clone()
    if _grouped():
        dist.all_reduce(result, op=dist.ReduceOp.SUM)
    return result


def joined(values: Tensor) -> Tensor:
    """The rows of all ranks, in the order of ranks, without gradient; ranks have equally many."""
    rows = values.detach().contiguous()
    if not _grouped():
        return rows
    everyone = [torch.empty_like(rows) for _ in range(size())]
    dist.all_gather(everyone, rows)
    return torch.cat(everyone)


def mean(values: Tensor) -> Tensor:
    """Mean over all elements of all ranks, a scalar without gradient; ranks may differ in size."""
    summed = values.sum()
    everything, count = total(torch.stack([summed, torch.full_like(summed, values.numel())]))
    return everything / count


def gather(value: Any) -> list[Any]:
    """The values of all ranks, picklable, in the order of ranks, on every rank."""
    if not _grouped():
        return [value]
    everyone: list[Any] = [None] * size()
    dist.all_gather_object(everyone, value)
    return everyone


def decided(decide: Callable[[], T]) -> T:
    """What the main rank decides, picklable, on every rank.

    What it raises there ends the others too, who say nothing: a refusal is told once.
    """
    decision: T | None = None
    error: Exception | None = None
    if is_main():
        try:
            decision = decide()
        except Exception as caught:
            error = caught
    decision, refused = gather((decision, error is not None))[0]
    if error is not None:
        raise error
    if refused:
        raise SystemExit(1)
    return decision


def wait() -> None:
    """Go on when every rank has come here."""
    gather(None)


class Hosts:
    """The processes as hosts of their devices, who agree among themselves while those compute.

    They have a process group of their own (gloo): what goes through the devices' group is behind
    all that was asked of the devices before.
    """

    def __init__(self) -> None:
        self._group: Any = None

    def open(self) -> None:
        """Make the group; all ranks together."""
        if _grouped():
            self._group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def any(self, flag: bool) -> bool:
        """Whether it is set on any rank; all ranks together."""
        if self._group is None:
            return flag
        flags = torch.tensor(flag, dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flags)

    def gather(self, value: Any) -> list[Any]:
        """As `world.gather`, in this group."""
        if self._group is None:
            return [value]
        everyone: list[Any] = [None] * size()
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone

    def close(self) -> None:
        """Give the group up: a group that Python finds as it shuts down ends the process."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
