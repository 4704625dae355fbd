"""Writing trained weights of vision-language models in the form that peft and transformers read."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from diffalign.files import read_json
from diffalign.models.adapter_files import PEFT_FILE, PEFT_PREFIX
from diffalign.models.diffusion.export import replacing
from diffalign.models.diffusion.kohya import cast

MERGED = "merged"
"""Folder of the merged model, within that of its adapter."""


def write_model(
    folder: Path,
    *,
    base: Any,
    values: Mapping[str, Tensor],
    processor: Any,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a folder that `from_pretrained` opens.

    Args:
        folder: replaced as a whole.
        base: the model that training began with, read anew: in the one in training, what is frozen
            was rounded to the precision of the run. It becomes the trained one.
        values: of the trained parameters, by name.
        processor: written next to it.
        dtype: of the weights.
    """
    for name, value in values.items():
        base.get_parameter(name).data = value.detach().float().cpu()
    base.float()  # only now: what was trained need not be read
    _save(folder, base, processor, dtype)


def write_adapter(
    folder: Path,
    *,
    model: Any,
    values: Mapping[str, Tensor],
    whole: Sequence[str],
    base: str,
    revision: str | None,
    processor: Any,
) -> None:
    """Write a folder that `PeftModel.from_pretrained` opens.

    Args:
        folder: replaced as a whole.
        model: carries the adapter.
        values: of its trained parameters, by name.
        whole: dotted names of modules that were trained whole next to the adapter.
        base: path or hub id of the model without it, which peft looks for there.
        revision: of the hub id.
        processor: written next to it.
    """
    adapter = get_peft_model_state_dict(model, state_dict=dict(values))
    inside = tuple(f"{name}." for name in whole)
    tensors = adapter | {name: v for name, v in values.items() if name.startswith(inside)}
    settings = copy.deepcopy(model.peft_config["default"])
    settings.base_model_name_or_path = base
    settings.revision = revision
    settings.inference_mode = True
    settings.modules_to_save = [name.rpartition(".")[2] for name in whole] or None
    with replacing(folder) as partial:
        settings.save_pretrained(partial)
        save_file(
            {
                f"{PEFT_PREFIX}.{name}": value.detach().float().cpu().contiguous()
                for name, value in tensors.items()
            },
            partial / PEFT_FILE,
            metadata={"format": "pt"},
        )
        write_processor(partial, processor)


def write_merged(
    folder: Path,
    *,
    adapter: Path,
    base: Any,
    processor: Any,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model that an adapter makes of its base.

    Args:
        folder: replaced as a whole.
        adapter: what `write_adapter` wrote.
        base: the model without adapter, read anew: the one in training was rounded or quantised to
            the precision of the run.
        processor: written next to it.
        dtype: of the weights; None is that of the base.
    """
    merged: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    _save(folder, merged, processor, dtype)


def _save(folder: Path, model: Any, processor: Any, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        for name, parameter in model.named_parameters():
            parameter.data = cast(parameter.data, dtype, name)
    with replacing(folder) as partial:
        model.save_pretrained(partial, safe_serialization=True)
        write_processor(partial, processor)


def write_processor(folder: Path, processor: Any) -> None:
    """Write a processor as every version of transformers reads it.

    transformers 5 names a tokenizer's class, and lists its special tokens, as transformers 4 does
    not understand; it reads the older form as well.
    """
    processor.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    settings = read_json(file)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if settings.get("extra_special_tokens") == []:
        del settings["extra_special_tokens"]
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
