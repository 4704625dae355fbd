"""A vision-language model without weights: of the architecture that its config.json describes, on
the meta device, for what can be said of a run before a weight of it is there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PretrainedConfig

from diffalign.errors import ModelError
from diffalign.models.base import AbstractBlank
from diffalign.models.quantization import bytes_of_layer
from diffalign.models.vlm.families import find_modules
from diffalign.models.vlm.model import VisionLanguageModel

_PROCESSOR = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=0))


@dataclass(frozen=True)
class _BlankLocation:
    """Where weights would lie."""

    config: PretrainedConfig

    def load_complete(
        self, loader: Any, *, dtype: torch.dtype | Literal["auto"] = "auto", **options: Any
    ) -> Any:
        """A network in a precision; `auto` is that of its file."""
        known = dtype if dtype != "auto" else getattr(self.config, "dtype", None) or torch.float32
        with torch.device("meta"):
            return loader.from_config(self.config, dtype=known, **options)

    def identity(self, part: str) -> str:
        """None: there are no weights to tell from others."""
        return ""


def without_weights(model: Any) -> Any:
    """The settings of a model that loads blank: no weights are read, nothing is kept in few bits,
    and flash attention, which holds what torch's own holds, is torch's own."""
    flash = model.attention.startswith("flash")
    blank = replace(
        model,
        lora=model.lora and replace(model.lora, start=None),
        quantization=None,
        attention="sdpa" if flash else model.attention,
        prefix="repeated" if flash else model.prefix,
    )
    in_place = {"config": model.config, "_location": _BlankLocation(model.config)}
    vars(blank).update(in_place, processor=lambda: _PROCESSOR)
    return blank


class BlankVLM(AbstractBlank):
    """A vision-language model without weights."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.settings = without_weights(model)

    def ready(self, model: VisionLanguageModel) -> VisionLanguageModel:
        model._prefix_checked = True  # rows with branches are taken as they are
        return model

    def saved_by_few_bits(self, dtype: torch.dtype) -> tuple[int, int]:
        bits = self._model.quantization
        if bits is None:
            return 0, 0
        layers = [layer for _, layer in _quantised(self._model)]
        sizes = [layer.weight.numel() * dtype.itemsize for layer in layers]
        fewer = sum(sizes) - sum(bytes_of_layer(layer, bits) for layer in layers)
        return fewer, max(sizes, default=0) if bits == "4bit" else 0


def _quantised(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    network = _BlankLocation(model.config).load_complete(_class_of(model.config)[1])
    language = network.get_submodule(find_modules(network, where=model.path).language)
    for name, module in language.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def _class_of(config: PretrainedConfig) -> tuple[Any, Any]:
    """(its class, what makes one of a configuration)."""
    from transformers import AutoModelForImageTextToText

    classes: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return (classes[0] if isinstance(classes, tuple) else classes), AutoModelForImageTextToText


@dataclass(frozen=True, kw_only=True)
class BlankImage:
    """One image as a processor would give it, without a pixel."""

    tokens: int
    """That it is in a row."""
    inputs: Mapping[str, Tensor]
    """Outputs of the processor; floating-point ones on the meta device."""

    def repeated(self, n: int) -> dict[str, Tensor]:
        """The inputs of n of them."""
        return {name: torch.cat([value] * n) for name, value in self.inputs.items()}


def blank_image(model: Any, *, most_tokens: int) -> BlankImage:
    """The image that a run has to hold: the only size of a family, or the largest that fits.

    Args:
        model: the settings.
        most_tokens: that an image may have where the family gives large ones more of them.

    Raises:
        ModelError: a family whose images are not known here.
    """
    config = model.config
    tower = config.vision_config
    kind = str(type(config).model_type)
    if kind == "llava":
        side = tower.image_size
        dropped = config.vision_feature_select_strategy == "default"
        class_token = tower.model_type == "clip_vision_model"
        tokens = (side // tower.patch_size) ** 2 + class_token - dropped
        pixels = torch.empty(1, tower.num_channels, side, side, device="meta")
        return BlankImage(tokens=tokens, inputs={"pixel_values": pixels})
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        merge = tower.spatial_merge_size
        most = most_tokens
        if model.image_pixels is not None:
            most = min(most, model.image_pixels // (tower.patch_size * merge) ** 2)
        height = max(1, int(most**0.5))
        width = max(1, most // height)
        grid = torch.tensor([[1, height * merge, width * merge]])
        channels = getattr(tower, "in_channels", None) or tower.in_chans
        each = channels * tower.temporal_patch_size * tower.patch_size**2
        patches = torch.empty(height * width * merge**2, each, device="meta")
        return BlankImage(
            tokens=height * width, inputs={"pixel_values": patches, "image_grid_thw": grid}
        )
    raise ModelError(
        f"memory is planned for models of the families llava, qwen2_vl and qwen2_5_vl so far, and "
        f"{model.path} is a {kind}: start it with a small training.samples_per_device, and raise "
        f"that"
    )


def blank_row(model: Any, image: BlankImage, words: int) -> dict[str, Tensor]:
    """A conversation with one image and so many tokens after it: `input_ids` and what else there is
    per token, int64 [L] each."""
    config = model.config
    start = getattr(config, "vision_start_token_id", None)
    before = [] if start is None else [start]
    marker = config.image_token_id
    ids = torch.tensor([*before, *[marker] * image.tokens, *[0] * words])
    takes = inspect.signature(_class_of(config)[0].forward).parameters
    types = {"mm_token_type_ids": (ids == marker).long()} if "mm_token_type_ids" in takes else {}
    return {"input_ids": ids, **types}
