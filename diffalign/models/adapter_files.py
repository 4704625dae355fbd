"""Adapters on disk: where the file is, and what it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.errors import ModelError
from diffalign.files import open_tensors, read_json
from diffalign.models.runs import FINAL, RunCheckpoint, checkpoint_at, checkpoint_of
from diffalign.parsing import checked, parse_json, shortly

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""The name of a LoRA that diffusers writes."""

PEFT_FILE = "adapter_model.safetensors"
"""The name of an adapter that peft writes."""
PEFT_CONFIG = "adapter_config.json"
"""Its settings, next to it."""
PEFT_PREFIX = "base_model.model"
"""The beginning of the names of all tensors in a file of peft."""

METADATA = "lora_adapter_metadata"
"""Under which diffusers keeps the settings of an adapter in the file's header."""


def locate_adapter(path: Path) -> Path:
    """The adapter's file.

    Args:
        path: the file, a folder that holds one, the folder of a run that trained one (or of one
            that has not finished: its newest checkpoint), or a checkpoint.

    Raises:
        ModelError: there is none, there are several, or it is a pickle.
    """
    path = path.expanduser()
    if path.is_dir():
        if (checkpoint := checkpoint_at(path)) is not None:
            return checkpoint.file
        folder = path / FINAL if (path / FINAL).is_dir() else path
        candidates = sorted(folder.glob("*.safetensors"))
        usual = (ADAPTER_FILE, PEFT_FILE)
        named = [file for file in candidates if file.name in usual] or candidates
        if len(named) != 1:
            if (folder / "model_index.json").is_file() or (folder / "config.json").is_file():
                raise ModelError(
                    f"{folder}: a whole model and no adapter: where training goes on from it, give "
                    f"it as model.path"
                )
            found = ", ".join(file.name for file in candidates) or "none"
            raise ModelError(
                f"{folder}: expected {ADAPTER_FILE} or one .safetensors file, found {found}"
            )
        return named[0]
    if not path.is_file():
        raise ModelError(f"{path}: there is no such adapter")
    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: adapters are read from .safetensors only, never from pickles")
    return path


@dataclass(frozen=True)
class AdapterFile:
    """The part of an adapter that changes one network."""

    tensors: dict[str, Tensor]
    """By peft's names, in float32 or as they were stored."""
    scale: float
    """By which the product of the factors is multiplied."""
    modules: dict[str, Tensor]
    """Weights of modules that were trained whole next to the adapter, by their names."""
    others: tuple[str, ...] = ()
    """Names of tensors in the file that change other networks, such as text encoders."""


def read_adapter(file: Path, *, component: str) -> AdapterFile:
    """Read an adapter in the layout that diffusers, or peft, writes.

    Args:
        file: from `locate_adapter`.
        component: the network within the pipeline, such as `unet`; `PEFT_PREFIX` for peft.

    Raises:
        ModelError: it is damaged, of another layout, or changes another network.
    """
    if (checkpoint := checkpoint_of(file)) is not None:
        return _read_checkpoint(checkpoint)
    prefix = f"{component}."
    try:
        with open_tensors(file, error=ModelError) as opened:
            names = list(opened.keys())
            header = (opened.metadata() or {}).get(METADATA, "{}")
            ours = {
                name.removeprefix(prefix): opened.get_tensor(name)
                for name in names
                if name.startswith(prefix)
            }
    except ModelError as error:
        raise ModelError(f"{file}: cannot be read as an adapter: {error}") from error
    if not any(name.endswith(".lora_A.weight") for name in ours):
        raise ModelError(
            f"{file}: holds no tensor named {prefix}....lora_A.weight (its first is "
            f"{names[0] if names else 'none'}). {_advice(component)}"
        )
    if component == PEFT_PREFIX:
        scale = _scale(_peft_settings(file), "")
    else:
        settings = parse_json(header, f"{file}: {METADATA}", error=ModelError)
        scale = _scale(settings if isinstance(settings, dict) else {}, prefix)
    adapter = {name: value for name, value in ours.items() if ".lora_" in name}
    modules = {name: value for name, value in ours.items() if name not in adapter}
    others = tuple(name for name in names if not name.startswith(prefix))
    return AdapterFile(adapter, scale, modules, others)


def _read_checkpoint(checkpoint: RunCheckpoint) -> AdapterFile:
    """The adapter of a run as it was at a checkpoint; its scale is in the run's config."""
    settings = checkpoint.model().get("lora")
    if not isinstance(settings, dict):
        raise ModelError(
            f"{checkpoint.folder}: is of a run that trained all weights and no adapter: give it as "
            f"path of a model"
        )
    values = checkpoint.values()
    adapter = {
        name.removesuffix(".weight").removesuffix(".default")
        + ("" if ".lora_magnitude_vector" in name else ".weight"): value
        for name, value in values.items()
        if ".lora_" in name
    }
    if not any(name.endswith(".lora_A.weight") for name in adapter):
        raise ModelError(f"{checkpoint.file}: holds no adapter: it is not of this run")
    rank = settings.get("rank")
    alpha = rank if settings.get("alpha") is None else settings["alpha"]
    scale = _scale({"r": rank, "lora_alpha": alpha, "use_rslora": settings.get("rslora")}, "")
    modules = {name: value for name, value in values.items() if ".lora_" not in name}
    return AdapterFile(adapter, scale, modules)


def _advice(component: str) -> str:
    if component == PEFT_PREFIX:
        return f"Adapters are continued in the layout that peft writes: {PEFT_CONFIG}, {PEFT_FILE}"
    return (
        "Adapters are continued in the layout that diffusers writes: open it with "
        "load_lora_weights of a pipeline, and save it with save_lora_weights"
    )


def _peft_settings(file: Path) -> dict[str, object]:
    next_to = file.with_name(PEFT_CONFIG)
    try:
        content = read_json(next_to, error=ModelError)
        return checked(dict[str, Any], content, next_to, error=ModelError)
    except ModelError as error:
        raise ModelError(
            f"{file}: its settings are read from {PEFT_CONFIG} next to it: {error}"
        ) from error


def _scale(settings: dict[str, object], prefix: str) -> float:
    rank, alpha = settings.get(f"{prefix}r"), settings.get(f"{prefix}lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        return 1.0
    if not 0 < rank < 2**31 or not abs(alpha) < 2**31:
        given = f"rank {shortly(rank)} and alpha {shortly(alpha)}"
        raise ModelError(f"the adapter's settings say {given}, which give no scale")
    return alpha / (math.sqrt(rank) if settings.get(f"{prefix}use_rslora") else rank)
