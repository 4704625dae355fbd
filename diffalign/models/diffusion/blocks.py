"""Blocks of a denoiser: whose activations are computed again, and which are compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from diffalign.errors import ModelError, did_you_mean

_REPEATED = "transformer_blocks"
"""Lists of blocks that are alike, in UNets and in transformers."""


def block_names(network: nn.Module) -> list[str]:
    """What `gradient_checkpointing` may name: the outermost blocks of a network and the lists that
    they stand in, such as `down_blocks`, `down_blocks.1` and `mid_block`."""
    names = []
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList) and name.endswith("blocks"):
            names += [name, *(f"{name}.{number}" for number in range(len(child)))]
        elif name.endswith("_block"):
            names.append(name)
    return names


def check_blocks(network: nn.Module, chosen: Sequence[str]) -> None:
    """Raise ModelError for a name that is not of `block_names`, and for none at all."""
    allowed = block_names(network)
    said = f"{type(network).__name__} has the blocks {', '.join(allowed)}"
    if not chosen:
        raise ModelError(f"gradient_checkpointing is an empty list: write false. {said}")
    for name in chosen:
        if name not in allowed:
            raise ModelError(
                f"gradient_checkpointing names {name!r}, and {said}.{did_you_mean(name, allowed)}"
            )


def checkpoint_blocks(network: Any, chosen: Sequence[str]) -> None:
    """Recompute activations in the backward pass, in some blocks of a network of diffusers.

    Args:
        network: calls a function at each of its innermost blocks.
        chosen: from `block_names`; all that lies in them is recomputed.
    """
    inside = tuple(f"{name}." for name in chosen)
    recomputed = {
        module for name, module in network.named_modules() if f"{name}.".startswith(inside)
    }

    def call(module: nn.Module, *arguments: Any) -> Any:
        if module in recomputed:
            return checkpoint(module.__call__, *arguments, use_reentrant=False)
        return module(*arguments)

    network.enable_gradient_checkpointing(call)


def compile_blocks(network: nn.Module) -> None:
    """Compile every block that repeats, each for itself: blocks that are alike share their graphs,
    so that there is little to compile."""
    for name, module in network.named_modules():
        if name.rpartition(".")[2] == _REPEATED and isinstance(module, nn.ModuleList):
            for block in module:
                block.compile()
