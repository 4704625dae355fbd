"""Where a network computes and in which precision, and how its weights are prepared for it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffalign.errors import ConfigError


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, copied from pinned memory so that the host need not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # An expanded tensor cannot be pinned: its rows share their memory.
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def choose_device(name: str) -> torch.device:
    """The named device, or for `auto` the best that this machine has.

    Raises:
        ConfigError: there is no such device here.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        return torch.device("cuda" if gpus else [*mps, "cpu"][0])
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for a GPU
        here = ", ".join(["auto", "cpu", *gpus, *mps])
        raise ConfigError(
            f"device is {name!r}, which is not here (this machine has: {here})"
        ) from error
    return device


Precision = Literal["float32", "bf16", "fp16"]

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def precision_of(dtype: torch.dtype) -> Precision:
    """The name of one of `DTYPES`."""
    return next(name for name, named in DTYPES.items() if named == dtype)


_PRODUCTS = (nn.Linear, nn.Conv2d, nn.Conv3d)


def is_product(module: nn.Module) -> bool:
    """Whether a layer multiplies by its weight, which autocast rounds."""
    return isinstance(module, _PRODUCTS)


def freeze(module: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Place a diffusers or transformers model that will only ever be evaluated."""
    module.requires_grad_(False).eval().to(device)
    values = (*module.parameters(), *module.buffers())
    if any(v.is_floating_point() and v.dtype != dtype for v in values):
        module.to(dtype)  # diffusers warns about every cast, also about one to the same


@contextmanager
def on_device(networks: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Within this context frozen networks of host memory compute on `device`.

    Their weights are copied there and dropped afterwards, so nothing of them stays: what lies in
    host memory is never written, and so never copied back.
    """
    kept = [
        (module, name, host)
        for network in networks
        for module in network.modules()
        for named in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, host in named
        if host.device != device
    ]
    try:
        with torch.inference_mode(mode=False):
            for module, name, host in kept:
                there = host.detach().to(device, non_blocking=True)
                is_parameter = isinstance(host, nn.Parameter)
                setattr(module, name, nn.Parameter(there, False) if is_parameter else there)
        yield
    finally:
        for module, name, host in kept:
            setattr(module, name, host)


def keep_in_host_memory(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Keep frozen networks there, pinned where `on_device` will copy to a GPU."""
    for network in networks:
        network.to("cpu")
        if device.type == "cuda":
            for tensor in (*network.parameters(), *network.buffers()):
                tensor.data = tensor.data.pin_memory()


def remove_dropout(network: nn.Module) -> None:
    """Take dropout out for good: `train()` cannot bring it back."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, nn.Identity())


def materialize(network: nn.Module) -> None:
    """Move weights out of the file that they may be mapped from, into memory of their own.

    In a file they lie at any offset, and on the CPU kernels round differently where storage is not
    aligned: a policy and a copy of it would already differ before the first step.
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()


def store_for_autocast(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen weights of matrix products in `dtype`; all others stay in float32.

    Autocast rounds those same weights to `dtype` at every call, so the output is bit for bit that
    of a float32 network under autocast, for half the memory.
    """
    for module in network.modules():
        if isinstance(module, _PRODUCTS):
            weight = module.weight
            if weight.is_floating_point() and not weight.requires_grad:  # not a quantised one
                module.to(dtype)


def stored_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A frozen copy of a network, as `store_for_autocast` would leave it; nothing is copied in more
    bits than it is kept in."""
    values = {}
    for module in network.modules():
        for value in module.parameters(recurse=False):
            less = isinstance(module, _PRODUCTS) and value.is_floating_point()
            kept = value.detach().to(dtype if less else value.dtype, copy=True)
            values[id(value)] = nn.Parameter(kept, requires_grad=False)
    return copy.deepcopy(network, values)


def upcast_trainable(network: nn.Module, *, besides: Collection[nn.Module] = ()) -> None:
    """Bring to float32 what was read in less, but for frozen weights of matrix products, which
    `store_for_autocast` takes from there to the precision of the run.

    Args:
        network: changed in place.
        besides: modules in it whose frozen weights stay as they are too.
    """
    kept = set(map(id, besides))
    for module in network.modules():
        stays = isinstance(module, _PRODUCTS) or id(module) in kept
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and (parameter.requires_grad or not stays):
                parameter.data = parameter.data.float()


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put all modules in evaluation mode, and each of them back into its own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
