"""Low-rank adapters on a diffusers network, through peft.

Sources: Hu et al. 2021, arXiv:2106.09685 (LoRA); Liu et al. 2024, arXiv:2402.09353 (DoRA);
Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffalign.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A low-rank adapter; the base stays frozen."""

    rank: int = 16
    """Inner dimension of every pair of factors."""
    alpha: int | None = None
    """The update is scaled by alpha / rank; null means equal to `rank`, a scale of one."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers that get an adapter: the last parts of their names in the network."""
    dropout: float = 0.0
    """Probability of dropping an input of the adapter while the policy trains; the reference has no
    adapter and hence no dropout."""
    dora: bool = False
    """Learn the length of each weight column apart from its direction."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps large ranks learning."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """Distribution of the first factor; the second is zero, so training starts at the base."""
    seed: int = 0
    """Of the first factor."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha is not None and self.alpha < 1:
            raise ValueError(f"alpha must be at least 1, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not self.targets:
            raise ValueError("targets is empty: name at least one layer, for example to_q")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def check_targets(network: nn.Module, settings: LoraSettings) -> None:
    """Raise ModelError if a target names no layer of the network; works on the meta device."""
    layers = [
        name
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    for target in settings.targets:
        if any(name == target or name.endswith(f".{target}") for name in layers):
            continue
        endings = sorted({_ending(name) for name in layers})
        nearest = difflib.get_close_matches(target, endings, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ModelError(
            f"lora.targets names {target!r}, which ends the name of no linear or convolution "
            f"layer of {type(network).__name__} (there are: {', '.join(endings)}).{hint}"
        )


def _ending(name: str) -> str:
    """The part of a layer's name that says what it does: `to_out.0`, not `0`."""
    parts = name.split(".")
    first = next(i for i in range(len(parts) - 1, -1, -1) if not parts[i].isdigit())
    return ".".join(parts[first:])


def attach(network: Any, settings: LoraSettings) -> None:
    """Add an adapter to a frozen diffusers network, on its device and in its dtype.

    The initial values depend on `settings.seed` alone; the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(settings.seed)
        network.add_adapter(
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
                target_modules=list(settings.targets),
                lora_dropout=settings.dropout,
                use_dora=settings.dora,
                use_rslora=settings.rslora,
                init_lora_weights="gaussian" if settings.init == "gaussian" else True,
            )
        )


@contextmanager
def disabled(network: nn.Module) -> Iterator[None]:
    """Run the base alone. What trains afterwards is what trained before, whatever happens inside.

    peft switches `requires_grad` off and on together with the adapter, and on for the active
    adapter even where it had been off: the flags are put back one by one.
    """
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def portable_state(
    network: nn.Module, values: Mapping[str, Tensor], settings: LoraSettings
) -> dict[str, Tensor]:
    """The adapter as files hold it, float32 and contiguous on the CPU.

    The scale is multiplied into the second factor. A reader that finds no alpha takes it to be the
    rank, and many readers look for none.

    Args:
        network: carries the adapter.
        values: trained parameters by their names in the network.
        settings: what `attach` was given.
    """
    state = get_peft_model_state_dict(network, state_dict=dict(values))
    return {
        name: (value * settings.scale if ".lora_B." in name else value)
        .detach()
        .to("cpu", torch.float32)
        .contiguous()
        for name, value in state.items()
    }
