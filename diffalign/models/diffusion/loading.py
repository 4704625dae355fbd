"""From a denoiser as it was read to the policy that trains, and its frozen copy."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch

from diffalign.errors import ModelError
from diffalign.models import lora
from diffalign.models.devices import materialize, remove_dropout, store_for_autocast
from diffalign.models.lora import LoraSettings, Scope

Attention = Literal["default", "sdpa", "xformers"]


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """How a denoiser is made one in training."""

    lora: LoraSettings | None
    """The adapter; None trains all weights."""
    adapter_layers: Scope
    """Which layers may get one."""
    component: str
    """Name of the network within its pipeline."""
    attention: Attention
    fused_attention: type | None
    """The processor of torch's fused attention; None where the network's default is that."""
    gradient_checkpointing: bool

    def check(self, network: Any) -> None:
        """Raise ModelError if the network cannot be trained so.

        Args:
            network: on the meta device; it may get an adapter.
        """
        if self.lora is not None:
            lora.check_targets(network, self.lora, scope=self.adapter_layers)
            lora.check_start(
                network, self.lora, component=self.component, scope=self.adapter_layers
            )
        if self.attention == "xformers":
            _check_xformers()

    def prepare(
        self, network: Any, compute_dtype: torch.dtype, *, copied: bool
    ) -> tuple[Any, Any | None]:
        """The policy, in training mode, and if asked for, its frozen copy.

        Args:
            network: in float32 on the CPU; it becomes the policy.
            compute_dtype: of the autocast; what is frozen is stored in it.
            copied: whether a copy is made.
        """
        remove_dropout(network.requires_grad_(False))
        materialize(network)
        self._set_attention(network)
        frozen = copy.deepcopy(network) if copied else None
        if frozen is not None:
            store_for_autocast(frozen, compute_dtype)
        if self.lora is None:
            network.requires_grad_(True)
        else:
            store_for_autocast(network, compute_dtype)
            network.float()  # DoRA reads lengths off the rounded weights
            lora.attach(network, self.lora, component=self.component, scope=self.adapter_layers)
            store_for_autocast(network, compute_dtype)
        if self.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return network.train(), frozen

    def _set_attention(self, network: Any) -> None:
        if self.attention == "xformers":
            network.enable_xformers_memory_efficient_attention()
        elif self.attention == "sdpa" and self.fused_attention is not None:
            network.set_attn_processor(self.fused_attention())


def _check_xformers() -> None:
    if importlib.util.find_spec("xformers") is None:
        raise ModelError(
            "attention is xformers, which is not installed: "
            "pip install 'diffalign[xformers]', or use sdpa"
        )
    if not torch.cuda.is_available():
        raise ModelError(
            "attention is xformers, which needs a CUDA device, and this machine has none: use sdpa"
        )
