"""The processes that train together; without a process group, a world of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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
