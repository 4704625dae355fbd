"""LoRA files of the kind that kohya's sd-scripts write, and ComfyUI and A1111 read.

A layer is `lora_unet_NAME` with `.lora_down.weight`, `.lora_up.weight`, `.alpha` (the update is
scaled by alpha / rank) and, for DoRA, `.dora_scale`. Diffusers' own converter writes the rank for
alpha, whatever it was, and leaves the magnitude of DoRA under a name that no reader knows.

Sources: the readers: ComfyUI `comfy/lora.py`, `comfy/weight_adapter/`; A1111
`extensions-builtin/Lora/networks.py`; metadata: kohya-ss `library/sai_model_spec.py`,
`networks/lora.py`, and Stability AI's ModelSpec 1.0.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.errors import ModelError
from diffalign.models.diffusion.original_layout import unet_module_name

KOHYA_FILE = "kohya_lora.safetensors"
"""What such a file is called next to the one that diffusers reads."""

_PARTS = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "magnitude"}
"""How peft calls the tensors of a layer."""


@dataclass(frozen=True)
class LoraLayer:
    """What an adapter does to one linear layer or convolution of weight [out, in, ...]."""

    down: Tensor
    """First factor, shape [rank, in, ...]."""
    up: Tensor
    """Second factor, shape [out, rank] or [out, rank, 1, 1]."""
    scale: float
    """By which the product of the factors is multiplied."""
    magnitude: Tensor | None = None
    """DoRA: the length of every output's row of weights, `out` numbers in any shape."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        """The scale as readers of the file compute it: alpha / rank."""
        return self.scale * self.rank


def lora_layers(
    state: Mapping[str, Tensor], scales: Mapping[str, float] | float, *, where: str
) -> dict[str, LoraLayer]:
    """The layers of an adapter, by the names of the modules that they change.

    Args:
        state: tensors by peft's names within the network, such as `conv_in.lora_A.weight`.
        scales: of every module, or one for all.
        where: what the tensors are of, for messages.

    Raises:
        ModelError: a tensor is none that a LoRA file of this kind can hold.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        module, _, part = name.rpartition(".lora_")
        part = f"lora_{part}".replace("magnitude_vector.weight", "magnitude_vector")
        if not module or part not in _PARTS:
            raise ModelError(
                f"{where} holds {name}, and a LoRA for ComfyUI, A1111 and kohya's tools can hold "
                f"the factors and the magnitude of a UNet's layers alone: export a merged model"
            )
        found.setdefault(module, {})[_PARTS[part]] = value
    for module, parts in found.items():
        if not {"down", "up"} <= parts.keys():
            raise ModelError(f"{where}: {module} has one of its two factors only")
    return {
        module: LoraLayer(scale=scales if isinstance(scales, float) else scales[module], **parts)
        for module, parts in found.items()
    }


def lora_names(modules: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """What layers of a UNet are called in such a file.

    ComfyUI and A1111 know a layer by its name in diffusers and by its name in the original layout.
    The first is taken, for all; but A1111 knows no embedding of SDXL's sizes by it, and takes the
    upsampler of SDXL's first up block for that of SD 1.5, which has no attention before it. An
    adapter of such a layer is in original names as a whole, since diffusers reads no mixture.

    Args:
        modules: names in diffusers.
        config: of the UNet.

    Raises:
        ModelError: a layer has no name that both know.
    """
    modules = list(modules)
    misread = ("add_embedding.linear_1", "add_embedding.linear_2", "up_blocks.0.upsamplers.0.conv")
    original = family(config) == "sdxl" and not set(modules).isdisjoint(misread)
    originals = {module: unet_module_name(module, config) for module in modules}
    names = originals if original else dict(zip(modules, modules, strict=True))
    return {module: f"lora_unet_{name.replace('.', '_')}" for module, name in names.items()}


@dataclass(frozen=True)
class KohyaLora:
    """A file of this kind before it is written."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """Of its header."""


def kohya_lora(
    layers: Mapping[str, LoraLayer],
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    title: str,
    base: str,
    velocity: bool,
) -> KohyaLora:
    """An adapter as a file of this kind.

    Args:
        layers: of a UNet, by the names of its modules in diffusers.
        config: of the UNet.
        dtype: of all tensors but alpha; those that have it already are shared.
        title: what lists of files show.
        base: name of the model that the adapter is for, no path.
        velocity: whether that model predicts velocity.

    Raises:
        ModelError: a layer has no name there, or a number is too large for `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    for module, name in lora_names(layers, config).items():
        layer = layers[module]
        tensors[f"{name}.lora_down.weight"] = cast(layer.down, dtype, module)
        tensors[f"{name}.lora_up.weight"] = cast(layer.up, dtype, module)
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
        if layer.magnitude is not None:
            # A column: a row, and a flat vector of a square layer, would mean the inputs.
            column = layer.magnitude.reshape(-1, *[1] * (layer.down.ndim - 1))
            tensors[f"{name}.dora_scale"] = cast(column, dtype, module)
    kind = family(config)
    version = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[kind]
    metadata = {
        "format": "pt",
        "ss_output_name": title,
        "ss_sd_model_name": base,
        "ss_base_model_version": version + ("_v" if velocity and kind == "sd2" else ""),
        "ss_v2": str(kind == "sd2"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": _uniform(layer.rank for layer in layers.values()),
        "ss_network_alpha": _uniform(layer.alpha for layer in layers.values()),
        "ss_network_args": json.dumps(_arguments(layers.values())),
        **modelspec(config, title=title, velocity=velocity, kind="lora"),
    }
    return KohyaLora(tensors, metadata)


def _arguments(layers: Collection[LoraLayer]) -> dict[str, str]:
    """What kohya's tools call the shape of an adapter beyond its rank."""
    convolutions = [layer for layer in layers if layer.down.ndim == 4]
    arguments = {}
    if convolutions:
        arguments["conv_dim"] = _uniform(layer.rank for layer in convolutions)
        arguments["conv_alpha"] = _uniform(layer.alpha for layer in convolutions)
    if any(layer.magnitude is not None for layer in layers):
        arguments |= {"dora_wd": "True", "wd_on_output": "True"}
    return arguments


def modelspec(
    config: Mapping[str, Any], *, title: str, velocity: bool, kind: Literal["lora", "checkpoint"]
) -> dict[str, str]:
    """Stability AI's description of a file in its header.

    Args:
        config: of the UNet.
        title: for lists of files.
        velocity: whether the model predicts velocity.
        kind: an adapter, or a whole model.
    """
    size = config.get("sample_size") or 0
    height, width = (size, size) if isinstance(size, int) else size
    architecture = {
        "sd1": "stable-diffusion-v1",
        "sd2": "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512",
        "sdxl": "stable-diffusion-xl-v1-base",
    }[family(config)]
    original = kind == "checkpoint" or family(config) == "sdxl"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture + ("/lora" if kind == "lora" else ""),
        "modelspec.implementation": (
            "https://github.com/Stability-AI/generative-models" if original else "diffusers"
        ),
        "modelspec.title": title,
        "modelspec.resolution": f"{8 * width}x{8 * height}",
        "modelspec.prediction_type": "v" if velocity else "epsilon",
    }


def family(config: Mapping[str, Any]) -> Literal["sd1", "sd2", "sdxl"]:
    """Which Stable Diffusion a UNet is of, by its configuration.

    Raises:
        ModelError: it is of another network.
    """
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise ModelError(
            f"kohya's tools have no names for the layers of {config['_class_name']}: ComfyUI reads "
            f"what form=diffusers writes"
        )
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if config.get("cross_attention_dim") == 1024 else "sd1"


def cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor as a file holds it: contiguous, on the CPU.

    Raises:
        ModelError: it is not finite, or too large for `dtype`.
    """
    value = value.detach().cpu()
    if value.is_floating_point():
        narrowed = value.to(dtype)
        if not narrowed.isfinite().all():
            largest = value.abs().max().item()
            raise ModelError(
                f"{name} holds {largest:g}, which {dtype} cannot: set dtype to bf16 or float32, "
                f"unless the model itself is damaged"
            )
        value = narrowed
    return value.contiguous()


def _uniform(given: Iterable[float]) -> str:
    """The one value, or the word that kohya's tools have for several."""
    values = {round(value, 6) for value in given}
    return f"{values.pop():g}" if len(values) == 1 else "Dynamic"
