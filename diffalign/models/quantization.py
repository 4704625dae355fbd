"""Frozen weights of few bits below an adapter, through bitsandbytes.

Sources: Dettmers et al. 2022, arXiv:2208.07339 (8 bits); 2023, arXiv:2305.14314 (4 bits, QLoRA).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import Tensor, nn

from diffalign.errors import ModelError
from diffalign.models.lora import LoraSettings
from diffalign.models.weights import MADE_OF

Bits = Literal["4bit", "8bit"]

FIRST_ON_CPU = "0.50"
"""The bitsandbytes whose layers were trained on a CPU here."""

_BLOCKS = "transformer_blocks."
"""In the names of the layers that are quantised: attention and feed-forward of transformer blocks.
Convolutions, norms, embeddings and projections in and out are few or sensitive, and stay."""


def refuse_around(bits: Bits, *, lora: LoraSettings | None, compiled: bool) -> None:
    """Raise ValueError, naming the settings, for what cannot go with weights of few bits."""
    if lora is None:
        raise ValueError(
            f"quantization is {bits}, and weights of so few bits cannot train: give lora a rank, "
            f"or set quantization to null"
        )
    if lora.dora:
        raise ValueError(
            f"quantization is {bits}, and lora.dora learns the lengths of weights as they are "
            f"rounded, while its file goes with those of the base: set lora.dora to false"
        )
    if compiled:
        raise ValueError(
            f"quantization is {bits}, and layers of few bits are no part of a compiled graph: set "
            f"compile to false"
        )


def check_quantization(bits: Bits) -> None:
    """Raise ModelError where layers of so few bits cannot run; nothing is imported or allocated."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantization is {bits}, which needs bitsandbytes, and it is not installed: "
            f"pip install 'diffalign[bitsandbytes]', or set quantization to null"
        )
    if torch.cuda.is_available():
        return
    version = importlib.metadata.version("bitsandbytes")
    if Version(version) < Version(FIRST_ON_CPU):
        raise ModelError(
            f"quantization is {bits}, and this machine has no CUDA device: bitsandbytes {version} "
            f"needs one, and {FIRST_ON_CPU} runs on the CPU as well: pip install "
            f"'bitsandbytes>={FIRST_ON_CPU}', or set quantization to null"
        )


def quantised_layers(network: nn.Module) -> list[str]:
    """Names of the layers whose weights would be kept in few bits."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and _BLOCKS in f"{name}."
    ]


def bytes_of_layer(layer: nn.Linear, bits: Bits) -> int:
    """What the weights of a layer take: 4 bits with a scale of 8 bits for each 64 of them and a
    float32 for each 256 scales, or 8 bits with a float32 for each row."""
    weights, rows = layer.weight.numel(), layer.weight.shape[0]
    if bits == "8bit":
        return weights + 4 * rows
    return weights // 2 + weights // 64 + weights // (64 * 256) * 4


def quantise_blank(network: Any, bits: Bits, compute_dtype: torch.dtype) -> None:
    """Put layers of few bits into a blank network; `weights.fill` then quantises each weight as it
    is read, so that one of them at a time is held as the file has it.

    Args:
        network: on the meta device, without an adapter; changed in place.
        bits: `4bit` is NF4 in blocks of 64 whose scales are quantised again, `8bit` int8 by rows
            with outliers apart.
        compute_dtype: of the products, and of the weights before they are quantised.

    Raises:
        ModelError: there is nothing to quantise.
    """
    names = quantised_layers(network)
    if not names:
        raise ModelError(
            f"quantization is {bits}, and {type(network).__name__} has no linear layer in "
            f"transformer blocks: set quantization to null"
        )
    for name in names:
        inside, _, last = name.rpartition(".")
        plain = network.get_submodule(name)
        setattr(network.get_submodule(inside), last, _blank_layer(plain, bits, compute_dtype))
    setattr(network, f"is_loaded_in_{bits}", True)  # which layers of its own peft puts around them


def _blank_layer(plain: nn.Linear, bits: Bits, compute_dtype: torch.dtype) -> nn.Linear:
    from bitsandbytes import nn as bnb

    shape = (plain.in_features, plain.out_features, plain.bias is not None)
    layer: nn.Linear
    with torch.device("meta"):
        if bits == "4bit":
            layer = bnb.Linear4bit(
                *shape, compute_dtype=compute_dtype, compress_statistics=True, quant_type="nf4"
            )
        else:
            layer = bnb.Linear8bitLt(*shape, has_fp16_weights=False)
    if bits == "4bit":
        # Where a CPU has bf16 products, it would repack weights in evaluation, for good, and give
        # no gradient any more.
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.to(compute_dtype))
    layer.requires_grad_(False)
    setattr(layer.weight, MADE_OF, _maker(layer, bits, compute_dtype))
    return layer


def _maker(
    layer: nn.Linear, bits: Bits, compute_dtype: torch.dtype
) -> Callable[[Tensor, torch.device], nn.Parameter]:
    def make(value: Tensor, device: torch.device) -> nn.Parameter:
        from bitsandbytes import nn as bnb

        plain = torch.empty(value.shape, dtype=compute_dtype).copy_(value)
        made: Any
        if bits == "4bit":
            made = bnb.Params4bit(
                plain,
                requires_grad=False,
                compress_statistics=True,
                quant_type="nf4",
                module=layer,
            )
        else:
            made = bnb.Int8Params(plain, requires_grad=False, has_fp16_weights=False)
        return made.to(device)  # which quantises it

    return make
