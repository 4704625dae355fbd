"""Tensors that are shared out among processes, on disk: each process writes its part of them, and
any number of processes reads them again, whole or shared out in another way.

By torch's distributed checkpoints, in safetensors: one file a process, which says of every tensor
where in the whole its part belongs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffalign import world


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


def read_shards(
    folder: Path, make: Callable[[str, torch.Size, torch.dtype], Tensor]
) -> dict[str, Tensor]:
    """Read what `write_shards` wrote, on as many processes as there are now.

    Args:
        folder: with the files of all processes that wrote.
        make: of a name, a whole shape and a dtype, an empty tensor for it, whole or shared out;
            what is in that part is read, and no more.

    Returns:
        The tensors by name.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    found = reader.read_metadata().state_dict_metadata
    tensors = {name: make(name, said.size, said.properties.dtype) for name, said in found.items()}
    with warnings.catch_warnings():  # that it reads for this process alone: so it shall
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    return tensors
