"""Writing trained weights in the form that diffusers pipelines read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_adapter(
    folder: Path, *, pipeline: Any, component: str, state: Mapping[str, Tensor]
) -> None:
    """Write `pytorch_lora_weights.safetensors`, which `load_lora_weights(folder)` reads.

    Args:
        folder: replaced as a whole.
        pipeline: the diffusers pipeline class that will read it.
        component: name of the network within the pipeline, such as `unet`.
        state: the adapter with a scale of one, by peft's names.
    """
    with replacing(folder) as partial:
        pipeline.save_lora_weights(partial, **{f"{component}_lora_layers": dict(state)})


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
