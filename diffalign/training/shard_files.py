"""Tensors that are shared out among processes, on disk: each process writes its part of them, and
any number of processes reads them again, whole or shared out in another way.

By torch's distributed checkpoints, in safetensors: one file a process, which says of every tensor
where in the whole its part belongs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from diffalign import world

T = TypeVar("T")


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> list[Path]:
    """Write this process's part of tensors; every process must call.

    Args:
        folder: that has no other files.
        tensors: by name, all shared out.

    Returns:
        The files that this process wrote.

    Raises:
        OSError: they could not be written, on whichever process.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.api import CheckpointException

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        raise OSError(f"process {rank}: {first}") from error
    return sorted(folder.glob(f"shard-{world.rank() + 1:05d}-*.safetensors"))


def all_or_none(do: Callable[[], T]) -> T:
    """What this process does, unless it fails somewhere: then every process raises OSError."""
    failure: Exception | None = None
    try:
        done = do()
    except (OSError, SafetensorError) as error:
        failure = error
    said = next((said for said in world.gather(failure and str(failure)) if said is not None), None)
    if said is not None:
        raise OSError(said) from failure
    return done


def read_groups(
    folder: Path, like: Callable[[str, str], Tensor | None]
) -> dict[str, dict[str, Tensor]]:
    """Read what `write_shards` wrote, on as many processes as there are now.

    Args:
        folder: with the files of all processes that wrote, of tensors called `GROUP/NAME`.
        like: of a group and a name, a tensor as which the one of that name is shared out now, where
            it has the same shape: no more than this process's part is read; None reads it whole.

    Returns:
        Group -> tensors by name.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    said: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for key, tensor in said.items():
        shared = like(*key.split("/", maxsplit=1))
        dtype = tensor.properties.dtype
        if shared is None or shared.shape != tensor.size:
            tensors[key] = torch.empty(tensor.size, dtype=dtype)
        else:
            tensors[key] = torch.empty_like(shared, dtype=dtype)
    with warnings.catch_warnings():  # that it reads for this process alone: so it shall
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = value
    return groups
