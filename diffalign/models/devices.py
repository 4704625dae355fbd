"""Devices: which one is used, and moving small tensors there without making it wait."""

from __future__ import annotations

import torch
from torch import Tensor

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
