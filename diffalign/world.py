"""The processes that train together; without a process group, a world of one."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


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
