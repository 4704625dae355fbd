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

from diffalign.data.responses.collate import join_image_inputs
from diffalign.models.vlm.families import ModuleNames
from diffalign.models.vlm.quirks.base import AbstractFamily

_BARE = "output"
"""Key of the output of a tower that returns a tensor, as Qwen2-VL's does in transformers 4."""
_TUPLE = "output."
"""What keys begin with of one that returns tensors and lists of them, as Qwen3-VL's does there."""
_POOLED = ("pooler_output", "deepstack_features")
"""What is taken of a tower that holds the projector, where it has it."""


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """All images of some rows in reading order, as a model takes them; empty for text alone."""

    inputs: Mapping[str, Tensor]
    """Outputs of the image processor, such as `pixel_values`, on the model's device."""
    features: Mapping[str, Tensor] | None = None
    """Outputs of the tower for them, one entry per tensor of its output; None runs the tower."""
    features_axis: int = 0
    """Along which features of several images follow each other."""

    @classmethod
    def stack(cls, image_inputs: Sequence[ImageInputs]) -> ImageInputs:
        """The images of several groups of rows, one after the other."""
        shown = [some for some in image_inputs if some.inputs]
        if len(shown) <= 1:
            return shown[0] if shown else cls(inputs={})
        first = shown[0]
        return cls(
            inputs=join_image_inputs([some.inputs for some in shown]),
            features=None
            if first.features is None
            else {
                key: torch.cat([(some.features or {})[key] for some in shown], first.features_axis)
                for key in first.features
            },
            features_axis=first.features_axis,
        )


class _LookedAt(Exception):
    """The tower has run, once for all images."""


@torch.no_grad()
def look(
    model: Any, modules: ModuleNames, inputs: Mapping[str, Tensor], *, family: AbstractFamily
) -> ImageInputs:
    """Run the tower alone on some images.

    Args:
        model: of transformers, whose `get_image_features` knows how its tower is called.
        modules: where the parts of `model` are; the tower is frozen.
        inputs: see `ImageInputs`.
        family: knows which outputs of the tower are taken.

    Returns:
        The images with features. Their pixels are no longer needed and take no memory.
    """
    if not inputs:
        return ImageInputs(inputs={})
    features: dict[str, Tensor] = {}

    def remember(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            features.update(_kept(output, family.layers, pooled=modules.projector_in_tower))
            raise _LookedAt  # what comes after the tower is run again, with the features

        return run

    tower = model.get_submodule(modules.tower)
    inside = model.get_submodule(modules.body)
    accepted = inspect.signature(inside.get_image_features).parameters
    settings = {
        name: getattr(config, name)
        for config in (model.config.vision_config, model.config)  # Llama 4 has it in the first
        for name in ("vision_feature_layer", "vision_feature_select_strategy")
        if name in accepted and hasattr(config, name)
    }
    with replaced_forward(tower, remember), contextlib.suppress(_LookedAt):
        inside.get_image_features(**{k: v for k, v in inputs.items() if k in accepted}, **settings)
    return ImageInputs(
        inputs={key: _stand_in(v) if key == "pixel_values" else v for key, v in inputs.items()},
        features=features,
        features_axis=family.features_axis,
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
    with replaced_forward(tower, lambda _: lambda *args, **kwargs: _as_output(features)):
        yield


def _kept(output: Any, layers: Sequence[int], *, pooled: bool) -> dict[str, Tensor]:
    """The tensors of an output that are taken from it, by where they are in it."""
    if isinstance(output, Tensor):
        return {_BARE: output}
    if isinstance(output, tuple):
        return {_TUPLE + key: t for n, part in enumerate(output) for key, t in _flat(str(n), part)}
    if layers:
        return {f"hidden_states.{layer}": output.hidden_states[layer] for layer in layers}
    names = _POOLED if pooled else ("last_hidden_state",)
    return {key: tensor for n in names for key, tensor in _flat(n, getattr(output, n, None))}


def _flat(name: str, part: Any) -> list[tuple[str, Tensor]]:
    if isinstance(part, Tensor):
        return [(name, part)]
    return [(f"{name}.{number}", tensor) for number, tensor in enumerate(part or ())]


def _as_output(features: Mapping[str, Tensor]) -> Any:
    """A new record each time: models write their projected features into it."""
    if _BARE in features:
        return features[_BARE]
    parts: dict[str, Any] = {}
    for key, tensor in features.items():
        name, _, place = key.removeprefix(_TUPLE).partition(".")
        if place:
            parts.setdefault(name, {})[int(place)] = tensor
        else:
            parts[name] = tensor
    for name, part in parts.items():  # hidden states may be counted from the end
        if isinstance(part, dict) and name != "hidden_states":
            parts[name] = [part[place] for place in sorted(part)]
    if next(iter(features)).startswith(_TUPLE):
        return tuple(parts[name] for name in sorted(parts))
    output = BaseModelOutputWithPooling()
    for name, part in parts.items():
        setattr(output, name, part)
    return output


def _stand_in(pixels: Tensor) -> Tensor:
    """A tensor of the same shape that holds a number an image: 0 where the image is all zeros,
    which tells models that it is none, and 1 elsewhere; for patches, one number in all."""
    if pixels.dim() < 4:
        return pixels.new_zeros(()).expand(pixels.shape)
    is_image = (pixels != 0).flatten(-3).any(dim=-1)
    return is_image.to(pixels.dtype)[..., None, None, None].expand(pixels.shape)


@contextmanager
def replaced_forward(
    module: nn.Module, replace: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Within this context a module runs what `replace` makes of its forward."""
    own = module.__dict__.get("forward")  # hooks of accelerate set one
    module.forward = replace(module.forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
