"""One optimiser and its schedule, with nothing rescaled behind the user's back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from diffalign.errors import ConfigError
from diffalign.ranges import AtLeast, MoreThan, Ranged


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Ranged):
    """One optimiser and its schedule."""

    kind: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """AdamW (fused), its 8-bit form (the bitsandbytes extra), or Adafactor with a given learning
    rate, as the SDXL launcher of DiffusionDPO uses it."""
    lr: Annotated[float, MoreThan(0)]
    """Peak learning rate, applied as written: never rescaled by batch size or device count. Parts
    of a model may have their own, such as `model.projector_lr`; the schedule is the same."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 1e-2
    """Decoupled weight decay; the value of DiffusionDPO's train.py."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after warm-up: stay, or fall to 0 at the last step."""
    warmup_steps: Annotated[int, AtLeast(0)] = 0
    """Optimiser steps (not batches) of linear warm-up."""
    max_grad_norm: Annotated[float, MoreThan(0, "null turns clipping off")] | None = 1.0
    """Global L2 norm above which gradients are scaled down; null turns clipping off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {list(self.betas)}")


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise ConfigError if the optimiser's package is missing; nothing is allocated."""
    if config.kind == "adamw_8bit":
        _adamw_8bit()


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Trained parameters as groups of one learning rate, those of the config's own rate first.

    Args:
        named: names and parameters, in a fixed order.
        rates: peak learning rates of those that have their own, by name.

    Returns:
        What `build_optimizer` takes; without rates, one group in the given order.
    """
    members: dict[float | None, list[nn.Parameter]] = {None: []}
    for name, parameter in named:
        members.setdefault(rates.get(name), []).append(parameter)
    return [
        {"params": parameters} if rate is None else {"params": parameters, "lr": rate}
        for rate, parameters in members.items()
        if parameters
    ]


def build_optimizer(
    config: OptimizerConfig, parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The optimiser over the trained parameters, or groups of them, in their given order."""
    if config.kind == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters,
            lr=config.lr,
            weight_decay=config.weight_decay,
            clip_threshold=1.0,
            relative_step=False,
            scale_parameter=False,
        )
    shared: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.kind == "adamw_8bit":
        return _adamw_8bit()(parameters, **shared)
    return torch.optim.AdamW(parameters, fused=True, **shared)


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it leaves out a step by itself where the device says so, as torch's fused ones do.

    Of any other the host has to know before every step whether it may be taken.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@contextmanager
def step_where(optimizer: torch.optim.Optimizer, good: Tensor) -> Iterator[None]:
    """Within this context a step of the optimiser moves nothing, and counts as none, where the
    device finds `good`, a bool scalar, to be False.

    The way of torch's own loss scaler (`torch/amp/grad_scaler.py`): the attributes that a fused
    optimiser looks at.
    """
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = None, (~good).float()
    try:
        yield
    finally:
        del fused.grad_scale, fused.found_inf


def build_schedule(
    config: OptimizerConfig, optimizer: torch.optim.Optimizer, *, optimizer_steps: int
) -> LRScheduler:
    """The learning-rate schedule, to be stepped once per optimiser step on every rank alike."""
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=optimizer_steps,
    )


def _adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "optimizer.kind adamw_8bit needs bitsandbytes: pip install 'diffalign[bitsandbytes]', "
            "or set optimizer.kind=adamw"
        ) from error
    return AdamW8bit
