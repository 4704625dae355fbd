"""`diffalign env`: versions, devices, extras."""

from __future__ import annotations

import platform

import torch
from rich.console import Console
from rich.table import Table

from diffalign import __version__, versions
from diffalign.versions import TESTED_SET, Library

EXTRAS = (
    *("xformers", "bitsandbytes", "wandb", "tensorboard", "trackio"),
    *("nltk", "spacy", "textblob", "sentence-transformers"),
    *("starlette", "uvicorn"),
)


def run() -> None:
    """Print what a bug report needs: what is installed, next to what was tested."""
    libraries = [versions.library(name) for name in sorted(versions.required())]
    table = Table.grid(padding=(0, 2))
    table.add_row("diffalign", __version__)
    table.add_row("python", platform.python_version())
    table.add_row("system", platform.platform())
    for item in (*libraries, *map(versions.library, EXTRAS)):
        table.add_row(item.name, item.installed or "not installed", _judged(item))
    count = torch.cuda.device_count()
    devices = [torch.cuda.get_device_name(number) for number in range(count)]
    table.add_row("devices", ", ".join(devices) or f"CPU, {torch.get_num_threads()} threads")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(_summary(libraries))


def _judged(item: Library) -> str:
    if not item.installed and not item.allowed:
        return ""  # an extra that nobody asked for
    if not item.fits:
        return f"{item.name}{item.allowed} is needed"
    return "" if item.as_tested else f"tested with {item.tested}"


def _summary(libraries: list[Library]) -> str:
    if not versions.tested():
        return f"The list of tested versions ({TESTED_SET}) is not part of this installation."
    if not libraries:
        return "diffalign is not installed as a package, so its requirements are not known."
    others = [item.name for item in libraries if not item.as_tested or not item.fits]
    if not others:
        return f"All required libraries are in the tested versions ({TESTED_SET})."
    return f"In other versions than the tested ones ({TESTED_SET}): {', '.join(others)}."
