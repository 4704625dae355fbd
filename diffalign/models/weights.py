"""Networks that are filled from safetensors tensor by tensor, each in the precision and on the
device in which it is kept: nothing is held twice, and nothing in more bits than it stays in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import ModelError
from diffalign.files import open_tensors
from diffalign.models.sharding import is_sharded, make_room, shard_of

MADE_OF = "made_of"
"""Attribute of a blank parameter that is not kept as its value is: a function of value and device
that makes the parameter."""

_MAPPED = 2**28
"""Bytes of a file that are read before it is opened anew: what is mapped counts as memory."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    file: Path
    name: str


def stored_in(files: Iterable[Path]) -> dict[str, Stored]:
    """Where every tensor of safetensors files lies, by its name.

    Raises:
        ModelError: a file is gone or damaged.
    """
    found = {}
    for file in files:
        with open_tensors(file, error=ModelError) as opened:
            found.update({name: Stored(file, name) for name in opened.keys()})  # noqa: SIM118
    return found


Places = Mapping[str, tuple[nn.Module, str]]
"""Name of a tensor in the state of a network -> the layer that has it, and its name there."""


def places_in(network: nn.Module) -> Places:
    """Where the tensors of a network are; it goes on being true when layers are wrapped."""
    return {name: _place_of(network, name) for name in network.state_dict(keep_vars=True)}


def is_blank(network: nn.Module) -> bool:
    """Whether a network has no values yet."""
    return any(parameter.is_meta for parameter in network.parameters())


def cast_blank(network: Any, dtype: torch.dtype) -> Any:
    """The network itself, all of its weights kept in `dtype` from now on; diffusers' own method
    warns of a loss, and there are no values to lose."""
    return nn.Module.to(network, dtype=dtype)


def fill(
    network: nn.Module,
    stored: Mapping[str, Stored],
    *,
    device: torch.device,
    where: str = "",
    places: Places | None = None,
) -> None:
    """Give a blank network its weights; of one that is shared out, this process's part of each.

    Args:
        network: of diffusers, on the meta device, each tensor of the dtype in which it is kept.
        stored: where its tensors lie, by their names in it (or by older ones that it knows).
        device: where it is kept.
        where: what messages begin with.
        places: where its tensors are, by the names that `stored` has for them, where layers have
            been wrapped since they had these names.

    Raises:
        ModelError: tensors are missing, left over or of another shape, or a file is damaged.
    """
    stored = _renamed(network, stored)
    places = places_in(network) if places is None else places
    blank = {name: getattr(holder, last) for name, (holder, last) in places.items()}
    _refuse_others(network, blank, stored, where)
    make_room(network, device)
    for name, value in _read({name: stored[name] for name in blank}):
        if value.shape != blank[name].shape:
            raise ModelError(
                f"{where}{name} is of shape {list(value.shape)} in {stored[name].file}, and a "
                f"{type(network).__name__} of this config.json has it of shape "
                f"{list(blank[name].shape)}: the weights are of another model"
            )
        _place(places[name], value, blank[name], device)
    _compute_buffers(network, device)


def copy_into(blank: nn.Module, network: nn.Module) -> None:
    """Give a blank network the values of another one of its class, on the same device.

    Args:
        blank: on the meta device, each tensor of the dtype in which it is kept.
        network: is left as it is; no storage is shared.
    """
    values = dict(network.named_parameters()) | dict(network.named_buffers())
    for name, kept in [*blank.named_parameters(), *blank.named_buffers()]:
        _place(_place_of(blank, name), values[name].detach(), kept, values[name].device)


def _renamed(network: Any, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """By the names of today: autoencoders of 2022 call their attention otherwise."""
    names = dict(stored)
    rename = getattr(network, "_fix_state_dict_keys_on_load", None)
    if rename is not None:
        rename(names)
    return names


def _refuse_others(
    network: nn.Module, blank: Mapping[str, Tensor], stored: Mapping[str, Stored], where: str
) -> None:
    ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
    missing = sorted(blank.keys() - stored.keys())
    left = sorted(
        name
        for name in stored.keys() - blank.keys()
        if not any(re.search(pattern, name) for pattern in ignored)
    )
    said = [
        f"{what} {len(names)} tensors, such as {names[0]}"
        for what, names in (("lacks", missing), ("has no place for", left))
        if names
    ]
    if said:
        file = min((str(tensor.file) for tensor in stored.values()), default="no file")
        raise ModelError(
            f"{where}{file} does not hold the weights of the {type(network).__name__} of its "
            f"config.json: it {' and '.join(said)}. It is incomplete, or of another model"
        )


def _read(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Tensors as they lie, each mapped into memory only until the next one is asked for."""
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name, tensor in stored.items():
        by_file.setdefault(tensor.file, []).append((name, tensor.name))
    for file, names in by_file.items():
        waiting = iter(sorted(names, key=lambda pair: pair[1]))
        done = False
        while not done:
            with open_tensors(file, error=ModelError) as opened:
                mapped, done = 0, True
                for name, inside in waiting:
                    value = opened.get_tensor(inside)
                    mapped += value.nbytes
                    yield name, value
                    if mapped > _MAPPED:
                        done = False
                        break


def _place_of(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    inside, _, last = name.rpartition(".")
    return network.get_submodule(inside), last


def _place(place: tuple[nn.Module, str], value: Tensor, kept: Tensor, device: torch.device) -> None:
    """Put a copy of a value where a network has a blank: never the mapped storage itself, in which
    tensors lie at any offset, and kernels of the CPU round differently where it is not aligned."""
    holder, last = place
    if is_sharded(kept):
        shards: Any = getattr(holder, last)
        shards.detach().to_local().copy_(shard_of(value, shards))
        return
    if (made_of := getattr(kept, MADE_OF, None)) is not None:
        setattr(holder, last, made_of(value, device))
        return
    dtype = kept.dtype if kept.is_floating_point() else value.dtype
    copy = torch.empty(value.shape, dtype=dtype, device=device).copy_(value)
    if isinstance(kept, nn.Parameter):
        setattr(holder, last, nn.Parameter(copy, requires_grad=kept.requires_grad))
    else:
        setattr(holder, last, copy)


def _compute_buffers(network: Any, device: torch.device) -> None:
    """Fill what no file holds: buffers that a network makes of its configuration."""
    blank = {name: buffer for name, buffer in network.named_buffers() if buffer.is_meta}
    if not blank:
        return
    computed = dict(type(network).from_config(network.config).named_buffers())
    for name, kept in blank.items():
        _place(_place_of(network, name), computed[name], kept, device)
