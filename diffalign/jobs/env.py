"""`diffalign env`: versions, devices, extras."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

CORE = ("diffalign", "torch", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch")
EXTRAS = (
    *("xformers", "webdataset", "bitsandbytes", "wandb", "tensorboard", "trackio"),
    *("nltk", "spacy", "textblob", "sentence-transformers"),
)


def run() -> None:
    """Print what a bug report needs."""
    table = Table.grid(padding=(0, 2))
    table.add_row("python", platform.python_version())
    table.add_row("system", platform.platform())
    for package in (*CORE, "datasets", "safetensors", *EXTRAS):
        table.add_row(package, _version(package))
    count = torch.cuda.device_count()
    devices = [torch.cuda.get_device_name(number) for number in range(count)]
    table.add_row("devices", ", ".join(devices) or f"CPU, {torch.get_num_threads()} threads")
    Console(highlight=False).print(table)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
