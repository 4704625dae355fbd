"""One pass of a frozen vision tower for every response, policy and reference.

Two responses to one image, seen by policy and reference, are four forwards of a model whose tower
gives the same output each time. The tower runs once; in those forwards its stored output takes the
place of its computation. The projector after it still runs each time, since it may train.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

_BARE = "output"
"""Key of the output of a tower that returns a tensor, as Qwen2-VL's does in transformers 4."""


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """All images of some rows in reading order, as a model takes them; empty for text alone."""

    inputs: Mapping[str, Tensor]
    """Outputs of the image processor, such as `pixel_values`, on the model's device."""
    features: Mapping[str, Tensor] | None = None
    """Outputs of the tower for them, one entry per tensor of its output; None runs the tower."""

    @classmethod
    def stack(cls, image_inputs: Sequence[ImageInputs]) -> ImageInputs:
        """The images of several groups of rows, one after the other."""
        shown = [some for some in image_inputs if some.inputs]
        if len(shown) <= 1:
            return shown[0] if shown else cls(inputs={})
        first = shown[0]
        return cls(
            inputs={key: _join([some.inputs[key] for some in shown]) for key in first.inputs},
            features=None
            if first.features is None
            else {
                key: torch.cat([(some.features or {})[key] for some in shown])
                for key in first.features
            },
        )


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate rows; images of LLaVA-NeXT are padded to the largest number of tiles."""
    if tensors[0].dim() < 5:
        return torch.cat(list(tensors))
    tiles = max(tensor.shape[1] for tensor in tensors)
    padded = [t.new_zeros(len(t), tiles, *t.shape[2:]) for t in tensors]
    for target, tensor in zip(padded, tensors, strict=True):
        target[:, : tensor.shape[1]] = tensor
    return torch.cat(padded)


class _LookedAt(Exception):
    """The tower has run, once for all images."""


@torch.no_grad()
def look(
    model: Any, tower: nn.Module, inputs: Mapping[str, Tensor], *, layers: Sequence[int]
) -> ImageInputs:
    """Run the tower alone on some images.

    Args:
        model: of transformers, whose `get_image_features` knows how its tower is called.
        tower: the module of `model` that is frozen.
        inputs: see `Images`.
        layers: hidden states of the tower that are kept; none keeps its final output.

    Returns:
        The images with features. Their pixels are no longer needed and take no memory.
    """
    if not inputs:
        return ImageInputs(inputs={})
    features: dict[str, Tensor] = {}

    def remember(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            features.update(_kept(forward(*args, **kwargs), layers))
            raise _LookedAt  # what comes after the tower is run again, with the features

        return run

    accepted = inspect.signature(model.get_image_features).parameters
    settings = {
        name: getattr(model.config, name)
        for name in ("vision_feature_layer", "vision_feature_select_strategy")
        if name in accepted and hasattr(model.config, name)
    }
    with _replaced_forward(tower, remember), contextlib.suppress(_LookedAt):
        model.get_image_features(**{k: v for k, v in inputs.items() if k in accepted}, **settings)
    return ImageInputs(
        inputs={key: _shape_of(v) if key == "pixel_values" else v for key, v in inputs.items()},
        features=features,
    )


@contextmanager
def shown(tower: nn.Module, features: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Within this context the tower returns stored features instead of looking at pixels.

    Args:
        tower: the module whose forward is replaced.
        features: of all images of the forward, from `look`; None leaves the tower as it is.
    """
    if features is None:
        yield
        return
    with _replaced_forward(tower, lambda _: lambda *args, **kwargs: _as_output(features)):
        yield


def _kept(output: Any, layers: Sequence[int]) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {_BARE: output}
    if layers:
        return {str(layer): output.hidden_states[layer] for layer in layers}
    pooled: Tensor = output.pooler_output
    return {"pooler_output": pooled}


def _as_output(features: Mapping[str, Tensor]) -> Any:
    """A new record each time: models write their projected features into it."""
    if _BARE in features:
        return features[_BARE]
    if "pooler_output" in features:
        return BaseModelOutputWithPooling(pooler_output=features["pooler_output"])
    layers: Any = {int(layer): value for layer, value in features.items()}
    return BaseModelOutputWithPooling(hidden_states=layers)


def _shape_of(tensor: Tensor) -> Tensor:
    """A tensor of the same shape that holds one number."""
    return tensor.new_zeros(()).expand(tensor.shape)


@contextmanager
def _replaced_forward(
    module: nn.Module, replace: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    own = module.__dict__.get("forward")  # hooks of accelerate set one
    module.forward = replace(module.forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
