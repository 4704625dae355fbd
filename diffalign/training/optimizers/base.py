"""What all optimisers share, and the schedule of their learning rate; nothing is rescaled."""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from diffalign import components
from diffalign.errors import ConfigError
from diffalign.ranges import AtLeast, MoreThan, Ranged

if TYPE_CHECKING:  # settings are read where nothing is trained, and torch takes a second
    import torch
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler

Parameters: TypeAlias = "Sequence[nn.Parameter] | Sequence[dict[str, Any]]"
"""Trained parameters, or groups of them that have a learning rate of their own."""


@dataclass(frozen=True, kw_only=True)
class AbstractOptimizer(Ranged, abc.ABC):
    """One optimiser and its schedule; `kind` is its module, and `adamw` where none is named."""

    default_kind: ClassVar[str] = "adamw"
    """Kind of a section `optimizer` that names none."""
    package: ClassVar[str] = ""
    """Package that it comes from; empty for one that diffalign always has."""
    extra: ClassVar[str] = ""
    """Extra of diffalign that installs the package; empty for an optimiser from outside."""
    averages: ClassVar[bool] = False
    """Whether its result is not the weights that it trains but an average of them, which `averaged`
    gives."""
    shards: ClassVar[bool] = False
    """Whether it works where a process has parts of the weights alone: number by number, and
    tested so."""
    takes_own_rates: ClassVar[bool] = True
    """Whether parts of a model may have a learning rate of their own."""

    lr: Annotated[float, MoreThan(0)]
    """Peak learning rate, applied as written: never rescaled by batch size or device count. Parts
    of a model may have their own, such as `model.projector_lr`; the schedule is the same."""
    weight_decay: Annotated[float, AtLeast(0)] = 1e-2
    """Decoupled weight decay; the value of DiffusionDPO's train.py."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after warm-up: stay, or fall to 0 at the last step."""
    warmup_steps: Annotated[int, AtLeast(0)] = 0
    """Optimiser steps (not batches) of linear warm-up."""
    max_grad_norm: Annotated[float, MoreThan(0, "null turns clipping off")] | None = 1.0
    """Global L2 norm above which gradients are scaled down; null turns clipping off."""

    def check(self) -> None:
        """Raise ConfigError for what can be known before weights are read."""
        if not self.package or importlib.util.find_spec(self.package) is not None:
            return
        name = f"diffalign[{self.extra}]" if self.extra else self.package
        raise ConfigError(
            f"optimizer.kind {components.kind_of(self)} needs {self.package}, which is not "
            f"installed: pip install '{name}', or set optimizer.kind=adamw"
        )

    @abc.abstractmethod
    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """The optimiser over the trained parameters, or groups of them, in their given order."""

    def blank(self, parameters: Parameters) -> torch.optim.Optimizer:
        """What keeps in memory what `build`'s keeps, and may need no package or device for it."""
        return self.build(parameters)

    def averaged(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> list[Tensor]:
        """Values of the parameters in the result, where `averages` says that they differ.

        Args:
            optimizer: what `build` made; it is left as it is.
            parameters: as they train.

        Returns:
            New tensors, one a parameter.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it averages")

    def figures(self, optimizer: torch.optim.Optimizer) -> Mapping[str, float]:
        """What the log should hold of it, asked for once a logging interval."""
        return {}


@dataclass(frozen=True, kw_only=True)
class AbstractAdam(AbstractOptimizer):
    """An optimiser with the two moments of Adam, or with what takes their place."""

    betas: tuple[float, ...] = (0.9, 0.999)
    """Decay rates of the moments of gradient and squared gradient."""
    eps: float = 1e-8
    """Added to the denominator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {list(self.betas)}")

    @property
    def adam(self) -> dict[str, Any]:
        """The arguments that all forms of AdamW take."""
        return {
            "lr": self.lr,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Trained parameters as groups of one learning rate, those of the config's own rate first.

    Args:
        named: names and parameters, in a fixed order.
        rates: peak learning rates of those that have their own, by name.

    Returns:
        What `AbstractOptimizer.build` takes; without rates, one group in the given order.
    """
    members: dict[float | None, list[nn.Parameter]] = {None: []}
    for name, parameter in named:
        members.setdefault(rates.get(name), []).append(parameter)
    return [
        {"params": parameters} if rate is None else {"params": parameters, "lr": rate}
        for rate, parameters in members.items()
        if parameters
    ]


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
    settings: AbstractOptimizer, optimizer: torch.optim.Optimizer, *, optimizer_steps: int
) -> LRScheduler:
    """The learning-rate schedule, to be stepped once per optimiser step on every rank alike."""
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=optimizer_steps,
    )
