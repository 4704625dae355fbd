"""Networks whose weights are shared out among processes: how a model is loaded into its shards, and
how what is shared out is put together again.

Who shares them out is the caller's affair (`Sharder`). A network is handed to it while it has no
values; every process then reads its own part of every weight from the files, and no process ever
holds the whole network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffalign import world


class Sharder(Protocol):
    """Shares the weights of networks out among processes."""

    home: torch.device
    """Where shards are kept."""

    def shard(self, network: nn.Module) -> None:
        """Share out the parameters; values that are there are kept, blank ones stay blank.

        Args:
            network: blank, or on the CPU; changed in place. Where it has them, `whole_parts()` are
                modules of which every process keeps all, and `methods_of_shards` names methods that
                need its weights as its forward does.
        """


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has a part of a tensor alone."""
    return hasattr(tensor, "device_mesh")


def is_shared_out(network: nn.Module) -> bool:
    """Whether every process has a part of a network alone, so that all must call it at once."""
    return any(map(is_sharded, network.parameters()))


def shard_of(value: Tensor, like: Any) -> Tensor:
    """This process's part of a whole value.

    Args:
        value: of the shape of `like`, on any device.
        like: a tensor that is shared out.

    Returns:
        A view of `value`.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        like.shape, like.device_mesh, like.placements
    )
    for dimension, (start, length) in enumerate(zip(offset, shape, strict=True)):
        whole = length == value.shape[dimension]
        value = value if whole else value.narrow(dimension, start if length else 0, length)
    return value


def sharded_as(value: Tensor, like: Any) -> Tensor:
    """A whole value, shared out as `like` is, in its own dtype."""
    from torch.distributed.tensor import DTensor

    mine = torch.empty_like(like.detach().to_local(), dtype=value.dtype).copy_(
        shard_of(value, like)
    )
    return DTensor.from_local(
        mine, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def make_room(network: nn.Module, device: torch.device) -> None:
    """Give blank shards memory without values; all else stays as it is."""
    if not is_shared_out(network):
        return

    def with_memory(tensor: Tensor) -> Tensor:
        blank = is_sharded(tensor) and tensor.is_meta
        return torch.empty_like(tensor, device=device) if blank else tensor

    network._apply(with_memory)


def reshard(network: nn.Module) -> None:
    """Give up what was put together for a forward that no backward pass followed: it would be
    taken for the weights after these have moved."""
    for module in network.modules():
        part: Any = module
        if hasattr(part, "reshard"):
            part.reshard()


def cast_shards(network: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Keep parameters in other dtypes from now on; of what is shared out, each its own part.

    Args:
        network: shared out.
        dtypes: of parameters, by name.
    """
    wanted = {id(p): dtypes[name] for name, p in network.named_parameters() if name in dtypes}
    network._apply(lambda tensor: tensor.to(wanted.get(id(tensor), tensor.dtype)))


@torch.no_grad()
def gathered(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole values on the CPU of the main process, one after the other; every process must call.

    Args:
        named: tensors, shared out or not, in the same order everywhere.

    Returns:
        They by name; empty on all other processes.
    """
    whole = {}
    for name, tensor in named:
        value: Any = tensor.detach()
        value = value.full_tensor() if is_sharded(value) else value
        if world.is_main():
            whole[name] = value.cpu()
    return whole
