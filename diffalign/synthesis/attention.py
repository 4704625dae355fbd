"""Where a model looks while it writes a response.

Source: MIA-DPO (Liu et al. 2024, arXiv:2410.17637), gen_data of the authors' code: the attention of
one layer from generated tokens to image tokens, mean over heads and over those tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import ModelError
from diffalign.generation.writing import Request, Writer, Written


def layers_of(writer: Writer) -> Any:
    """The decoder layers of the language model.

    Raises:
        ModelError: they cannot be told.
    """
    language = writer.network.model.get_submodule(writer.network.module_names.language)
    layers = getattr(language, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(layers[0], "self_attn"):
        raise ModelError(
            f"the attention of {type(language).__name__} cannot be read: it has no list of layers "
            f"with a self_attn each. Use LLaVA-1.5, LLaVA-NeXT or Qwen2-VL"
        )
    return layers


def check_layer(writer: Writer, layer: int) -> None:
    """Raise ModelError unless the language model has that layer."""
    layers = layers_of(writer)
    if layer >= len(layers):
        raise ModelError(
            f"layer is {layer}, and the language model has {len(layers)}, 0 to {len(layers) - 1}"
        )


def attention_to_images(
    writer: Writer, request: Request, written: Written, *, layer: int
) -> list[Tensor]:
    """How much each image token was attended to.

    Args:
        writer: whose model wrote.
        request: what it was asked.
        written: its response. Its last token was never read by the model, and does not count.
        layer: of the language model, from 0.

    Returns:
        One float32 [N] for every run of consecutive image tokens, in reading order; that is every
        image, where text is between them.

    Raises:
        ModelError: the model gives no attention.
        ValueError: the response has one token.
    """
    if len(written.tokens) < 2:
        raise ValueError("a response of one token was never read by the model that wrote it")
    read = torch.cat([request.input_ids, written.tokens[:-1]])
    whole = replace(
        request,
        input_ids=read,
        further={
            name: torch.cat([values, values[-1:].expand(len(written.tokens) - 1)])
            for name, values in request.further.items()
        },
    )
    maps: list[Tensor] = []

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, Tensor):
            raise ModelError(
                f"{type(module).__name__} gives no attention weights, which this method needs; use "
                f"a model whose attention can be computed openly (`eager`)"
            )
        maps.append(weights[0, :, len(request.input_ids) :].float().mean(dim=(0, 1)).cpu())

    hook = layers_of(writer)[layer].self_attn.register_forward_hook(remember)
    try:
        with writer.model.inference(), _eager(writer):
            writer.network.last_hidden_state(**writer.inputs([whole]))
    finally:
        hook.remove()
    return [maps[0][run] for run in _runs(writer.image_positions(request))]


@contextmanager
def _eager(writer: Writer) -> Iterator[None]:
    """Within this context the language model computes attention step by step, and returns it."""
    language = writer.network.model.get_submodule(writer.network.module_names.language)
    before = language.config._attn_implementation
    language.set_attn_implementation("eager")
    try:
        yield
    finally:
        language.set_attn_implementation(before)


def _runs(positions: Tensor) -> list[Tensor]:
    """Ascending positions, cut where they are not consecutive."""
    gaps = (positions.diff() != 1).nonzero()[:, 0] + 1
    return list(positions.tensor_split(gaps.tolist()))
