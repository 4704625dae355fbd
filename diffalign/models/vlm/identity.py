"""Which vision-language model lies in a folder or on the hub, and what tells it from others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PretrainedConfig

from diffalign.errors import ModelError
from diffalign.files import read_json
from diffalign.models.adapter_files import PEFT_CONFIG
from diffalign.models.locate import locate
from diffalign.models.locations import AbstractLocation, Folder
from diffalign.models.lora import LoraSettings
from diffalign.models.single_file import SingleFile
from diffalign.models.vlm.families import TESTED
from diffalign.parsing import checked


def find_model(path: str, *, revision: str | None) -> AbstractLocation:
    """The folder or hub entry of a model.

    Raises:
        ModelError: it is a single file.
    """
    location = locate(path, revision=revision)
    if isinstance(location, SingleFile):
        raise ModelError(f"{path} is a single file: give the folder of the model")
    return location


def read_architecture(location: AbstractLocation, *, where: str) -> PretrainedConfig:
    """The architecture of a model, from its config.json.

    Args:
        location: of the model.
        where: what names it, for errors.

    Raises:
        ModelError: there is none, or none that writes text about images.
    """
    if isinstance(location, Folder):
        check_folder(location.path)
    content = location.read_json("config.json")
    kind = str(content.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{where}: config.json names the model_type {kind!r}, which this version of "
            f"transformers does not know. Known families are {', '.join(TESTED)}"
        )
    config: PretrainedConfig = CONFIG_MAPPING[kind].from_dict(content)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(
            f"{where} is a {kind}, which does not write text about images. Kind vlm "
            f"trains image-text-to-text models: {', '.join(TESTED)}, and others made of a "
            f"vision tower, a projector and a language model"
        )
    return config


def check_folder(folder: Path) -> None:
    """Raise ModelError for a folder that holds no model, and say what it holds instead."""
    if (folder / "config.json").is_file():
        return
    if (folder / PEFT_CONFIG).is_file():
        adapter = checked(
            dict[str, Any],
            read_json(folder / PEFT_CONFIG, error=ModelError),
            folder / PEFT_CONFIG,
            error=ModelError,
        )
        raise ModelError(
            f"{folder} holds an adapter: set path to its base, which was "
            f"{adapter.get('base_model_name_or_path')}, and lora to "
            f"{{rank: {adapter.get('r')}, start: {folder}}}"
        )
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    hint = (
        f"What a run trained is in {folder / 'final'}"
        if (folder / "final").is_dir()
        else "A model folder is what transformers' save_pretrained writes: config.json, "
        "*.safetensors, and the files of a processor"
    )
    raise ModelError(f"{folder} has no config.json (it holds: {found}). {hint}")


def without_start(lora: LoraSettings | None) -> LoraSettings | None:
    """The settings of an adapter, wherever it starts."""
    return lora and replace(lora, start=None)


def fingerprint(parts: Sequence[object]) -> str:
    """A short digest of what makes a model the one that it is."""
    return hashlib.blake2b(repr(list(parts)).encode(), digest_size=8).hexdigest()
