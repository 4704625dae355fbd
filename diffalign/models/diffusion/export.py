"""Writing trained weights in the form that diffusers pipelines read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from diffalign.commands import command, unused
from diffalign.errors import ModelError
from diffalign.files import disk_errors, finish_tree, flush
from diffalign.models import lora
from diffalign.models.diffusion.kohya import KOHYA_FILE, KohyaLora, lora_layers
from diffalign.models.lora import LoraSettings


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` on success alone.

    Whoever reads `folder` meanwhile, or after a crash, finds the old content or the new, whole.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        with disk_errors():
            yield partial
        finish_tree(partial)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_adapter(
    folder: Path,
    *,
    pipeline: Any,
    component: str,
    state: Mapping[str, Tensor],
    kohya: KohyaLora | None = None,
) -> None:
    """Write `pytorch_lora_weights.safetensors`, which `load_lora_weights(folder)` reads, and next
    to it the same for ComfyUI, A1111 and kohya's tools.

    Args:
        folder: replaced as a whole.
        pipeline: the diffusers pipeline class that will read it.
        component: name of the network within the pipeline, such as `unet`.
        state: the adapter with a scale of one, by peft's names.
        kohya: the second file; None leaves it out.
    """
    with replacing(folder) as partial:
        pipeline.save_lora_weights(partial, **{f"{component}_lora_layers": dict(state)})
        if kohya is not None:
            save_file(kohya.tensors, partial / KOHYA_FILE, metadata=kohya.metadata)


def export_adapter(
    folder: Path,
    pipeline: Any,
    component: str,
    network: nn.Module,
    values: Mapping[str, Tensor],
    settings: LoraSettings,
    make_kohya: Callable[..., KohyaLora],
) -> None:
    """Write an adapter as it trains, in both forms: see `write_adapter`, `kohya_or_none`.

    Args:
        folder, pipeline, component: see `write_adapter`.
        network: carries the adapter.
        values: trained parameters by their names in the network.
        settings: of the adapter.
        make_kohya: see `kohya_or_none`.
    """
    write_adapter(
        folder,
        pipeline=pipeline,
        component=component,
        state=lora.portable_state(network, values, settings),
        kohya=kohya_or_none(
            make_kohya, folder, lora.adapter_state(network, values), settings.scale
        ),
    )


def kohya_or_none(
    make: Callable[..., KohyaLora], folder: Path, state: Mapping[str, Tensor], scale: float
) -> KohyaLora | None:
    """The adapter for ComfyUI, A1111 and kohya's tools; None where such a file cannot hold it: a
    run must not end without its result for that.

    Args:
        make: of layers, a dtype and a title.
        folder: of the export, which gives the title.
        state: the adapter by peft's names, not scaled.
        scale: what the product of its factors is multiplied by.
    """
    title = folder.parent.name if folder.name == "final" else folder.name
    try:
        layers = lora_layers(state, scale, where="this adapter")
        return make(layers, dtype=torch.float32, title=title)
    except ModelError:
        return None


def with_weights(network: Any, values: Mapping[str, Tensor]) -> Any:
    """A network of the same architecture that holds `values` themselves: nothing is copied.

    Args:
        network: gives class and configuration; it is not touched.
        values: every parameter by name.
    """
    with torch.device("meta"):
        twin = type(network).from_config(network.config)
    twin.load_state_dict({**network.state_dict(), **values}, assign=True)
    return twin


def write_pipeline(folder: Path, pipeline: Any) -> None:
    """Write a complete pipeline folder, which `from_pretrained(folder)` opens."""
    with replacing(folder) as partial:
        pipeline.save_pretrained(partial, safe_serialization=True)
        restore_prefix(partial, pipeline)


def restore_prefix(folder: Path, pipeline: Any) -> None:
    """Name the weights of the written CLIP text encoders as every version of transformers does.

    transformers 5 writes `CLIPTextModel` without the prefix that all versions read; transformers 4
    would start such a file from random weights, with no more than a warning.

    Args:
        folder: what `pipeline.save_pretrained` wrote.
        pipeline: tells which of its parts are such encoders.
    """
    for component, part in pipeline.components.items():
        if isinstance(part, CLIPTextModel):
            file = folder / component / "model.safetensors"
            named = {
                f"text_model.{key.removeprefix('text_model.')}": value
                for key, value in load(file.read_bytes()).items()  # not mapped: it is overwritten
            }
            save_file(named, file, metadata={"format": "pt"})


def usage(
    pipeline: str,
    path: str,
    folder: str,
    *,
    adapter: str | None,
    denoiser: str | None,
    component: str,
    absent: Sequence[str],
) -> str:
    """Lines of Python that open what was exported.

    Args:
        pipeline: name of its class in diffusers.
        path: of the base, as the settings name it.
        folder: that was written.
        adapter: name of the adapter's file there; None if all weights were trained.
        denoiser: what the settings put in the place of the base's own; None is that.
        component: what the pipeline calls it.
        absent: parts that the class wants to be told are not there.
    """
    none = "".join(f", {name}=None" for name in absent)
    if adapter is None:
        opened = [f"pipeline = {pipeline}.from_pretrained({json.dumps(folder)}{none})"]
    else:
        opener = "from_single_file" if path.endswith(".safetensors") else "from_pretrained"
        opened = [
            f"pipeline = {pipeline}.{opener}({json.dumps(path)}{none})",
            f"pipeline.load_lora_weights({json.dumps(folder)}, weight_name={json.dumps(adapter)})",
        ]
        if denoiser is not None:
            opened.insert(
                1, f"# first put the denoiser of {json.dumps(denoiser)} in: pipeline.{component}"
            )
    return "\n".join([f"from diffusers import {pipeline}", "", *opened])


def next_step(base: Mapping[str, Any], start: Path | None, run: Path) -> str:
    """What to do with the result of a run: a sentence, and a command below it.

    Args:
        base: settings that open the model that was trained, as `generate` takes them, or None.
        start: the adapter that training went on from.
        run: folder of the run.
    """
    where = {name: value for name, value in base.items() if value is not None}
    if start is not None:
        where["lora"] = start
    settings = {
        **{"models.base": base["path"] if len(where) == 1 else where, "models.aligned": run},
        **{"prompts.texts": ["a red fox in the snow", "a teapot"], "seeds": 4},
        "output": unused(run / "compared"),  # it may hold images of fewer steps
    }
    return "Compare it with its base, here on two prompts:\n  " + command(
        "generate", settings, options=["--grid"]
    )
