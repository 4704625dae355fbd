"""A pipeline without weights: of the architecture that its configurations describe, on the meta
device, for what can be said of a model before a weight of it is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers

from diffalign.errors import ModelError
from diffalign.models.base import AbstractBlank
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.parts import PipelineParts
from diffalign.models.quantization import bytes_of_layer, quantised_layers

TEXT, VAE = "text encoders", "autoencoder"
"""Names of its frozen parts."""
_LONGEST = 512
"""Tokens of an encoder that knows no length of its own, as T5 does not."""


class BlankTokenizer:
    """Says how many tokens there are, and not which."""

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length

    def __call__(
        self, prompts: Sequence[str], *, max_length: int | None = None, **options: Any
    ) -> Any:
        ids = torch.zeros(len(prompts), max_length or self.model_max_length, dtype=torch.int64)
        return SimpleNamespace(input_ids=ids)


class BlankParts(PipelineParts):
    """Parts that are read without their weights, which need not exist."""

    @cached_property
    def pipeline_without_weights(self) -> Any:
        """What `read` gave, for a look at the parts of a loaded model."""
        found: dict[str, Any] = {self.component: self.blank_network(), "vae": self._blank_vae()}
        for name in self.encoders:
            encoder = self._blank_encoder(name)
            limit = getattr(encoder.config, "max_position_embeddings", None)
            found[name] = encoder
            found[name.replace("text_encoder", "tokenizer")] = BlankTokenizer(limit or _LONGEST)
        found |= dict.fromkeys(self.absent())
        settings = {name: value for name, value in self.index.items() if _is_setting(name, value)}
        settings.setdefault("force_zeros_for_empty_prompt", True)
        return SimpleNamespace(components=found, config=SimpleNamespace(**settings), **found)

    def read(self, network: Any | None = None, *, encoders: bool = True, **given: Any) -> Any:
        """The pipeline around a network, or around one of its own."""
        pipeline = self.pipeline_without_weights
        given = {name: part for name, part in given.items() if name in pipeline.components}
        if network is not None:
            given[self.component] = network
        if not encoders:
            given |= dict.fromkeys((*self.encoders, "vae"))
        for name, part in given.items():
            pipeline.components[name] = part
            setattr(pipeline, name, part)
        return pipeline

    def _blank_vae(self) -> Any:
        config = self._config_of("vae")
        try:
            with torch.device("meta"):
                return diffusers.AutoencoderKL.from_config(config).eval()
        except (TypeError, ValueError, KeyError) as error:
            raise ModelError(f"{self.name}: describes no autoencoder: {error}") from error

    def _blank_encoder(self, name: str) -> Any:
        given = self.index.get(name) or (None, "")
        config = self._config_of(name)
        try:
            encoder_class = getattr(transformers, given[1])
            with torch.device("meta"):
                return encoder_class(encoder_class.config_class(**config)).eval()
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            raise ModelError(
                f"{self.name}: {name}/config.json describes no {given[1]}: {error}"
            ) from error

    def _config_of(self, name: str) -> dict[str, Any]:
        if name == "vae" and self._autoencoder is not None:
            return self._autoencoder.read_json("./config.json")
        return self.location.read_json(f"{name}/config.json")

    def identities(self) -> list[str | None]:
        """None: there are no weights to tell from others."""
        return []


def _is_setting(name: str, value: Any) -> bool:
    return not name.startswith("_") and not isinstance(value, (list, tuple))


def without_weights(model: AbstractDiffusion) -> AbstractDiffusion:
    """The settings of a model that loads blank: whatever file of weights it names is not read, and
    nothing is kept in few bits."""
    lora = model.lora and dataclasses.replace(model.lora, start=None)
    blank = dataclasses.replace(model, lora=lora, quantization=None)
    parts = model.parts
    fields = {field.name: getattr(parts, field.name) for field in dataclasses.fields(parts)}
    vars(blank)["parts"] = BlankParts(**fields)
    return blank


class BlankDiffusion(AbstractBlank):
    """A denoiser without weights."""

    def __init__(self, model: AbstractDiffusion) -> None:
        self._model = model
        self.settings = self._blank = without_weights(model)

    def frozen_parts(self) -> dict[str, list[torch.nn.Module]]:
        parts = self._blank.parts
        pipeline = parts.read()
        encoders = [pipeline.components[name] for name in parts.encoders]
        held = {TEXT: encoders, VAE: [pipeline.components["vae"]]}
        return {name: [part for part in some if part is not None] for name, some in held.items()}

    def saved_by_few_bits(self, dtype: torch.dtype) -> tuple[int, int]:
        bits = self._model.quantization
        if bits is None:
            return 0, 0
        network = self._model.parts.blank_network()
        layers = [network.get_submodule(name) for name in quantised_layers(network)]
        whole = sum(layer.weight.numel() * dtype.itemsize for layer in layers)
        return whole - sum(bytes_of_layer(layer, bits) for layer in layers), 0
