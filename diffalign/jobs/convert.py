"""`diffalign convert WEIGHTS`: a pickled file of weights as a safetensors file, once.

Scorers read safetensors alone. Reward models are often released as pickles, which may hold code;
torch's restricted reader (`weights_only=True`) takes tensors from them and refuses all else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import ConfigError, ModelError
from diffalign.files import replacing_file, writing
from diffalign.models.preference.clip_loading import find_weights

_INSIDE = ("state_dict", "model", "module", "params")
"""Keys under which training scripts keep weights, next to counters and optimisers."""
_PARALLEL = "module."
"""What torch's wrapper for several GPUs puts in front of every name."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What is converted, and where the result goes."""

    weights: str
    """A pickled file (.bin, .ckpt, .pt, .pth), or one on the hub: `owner/name/file.pt`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its default branch."""
    output: Path | None = None
    """The .safetensors file to write, which must not exist; null is one of the same name: next to a
    file of this machine, and in the folder that you work in for one of the hub."""

    def __post_init__(self) -> None:
        if self.output is not None and self.output.suffix != ".safetensors":
            raise ValueError(f"output is {self.output}: give a name that ends in .safetensors")


def run(config: ConvertConfig) -> Path:
    """Convert.

    Returns:
        The file that was written: the same names, values and types.

    Raises:
        ConfigError: the output exists, or there is nothing to convert.
        ModelError: the file is missing, damaged, or holds something other than tensors.
    """
    console = Console(highlight=False)
    output = config.output or _beside(Path(config.weights))
    if Path(config.weights).suffix == ".safetensors":
        raise ConfigError(f"{config.weights} is a safetensors file already: scorers read it")
    if output.exists():
        raise ConfigError(f"{output} exists: give another output=FILE.safetensors, or delete it")
    file = find_weights(config.weights, revision=config.revision, allow_pickle=True)
    tensors, left_out = _read(file)
    # A copy each: safetensors takes no two tensors of one memory.
    copies = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors}
    with writing(output), replacing_file(output) as draft:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_file(copies, draft, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in copies.values())
    more = f"; left out, being no weights: {', '.join(left_out)}" if left_out else ""
    console.print(
        f"Done: {output}, {len(copies)} tensors, {size / 1e6:,.1f} MB{more}",
        markup=False,
        soft_wrap=True,
    )
    return output


def _beside(weights: Path) -> Path:
    folder = weights.parent if weights.is_file() else Path()
    return folder / weights.with_suffix(".safetensors").name


def _read(file: Path) -> tuple[list[tuple[str, Tensor]], list[str]]:
    """Tensors by name, and the names of what else is there."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises what its parts happen to raise
        raise ModelError(
            f"{file} cannot be read as tensors alone (weights_only), and is read in no other way: "
            f"{error}"
        ) from error
    left_out: list[str] = []
    inside = next((key for key in _INSIDE if _has_tensors(content, key)), None)
    if inside is not None:
        left_out = [str(key) for key in content if key != inside]
        content = content[inside]
    if not isinstance(content, Mapping):
        raise ModelError(f"{file} holds a {type(content).__name__}, and no tensors by name")
    found = [(str(name), value) for name, value in content.items() if isinstance(value, Tensor)]
    left_out += [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if not found:
        held = ", ".join(list(map(str, content))[:5]) or "nothing"
        raise ModelError(f"{file} holds no tensors by name (it holds: {held})")
    if all(name.startswith(_PARALLEL) for name, _ in found):
        found = [(name.removeprefix(_PARALLEL), value) for name, value in found]
    return found, left_out


def _has_tensors(content: Any, key: str) -> bool:
    inner = content.get(key) if isinstance(content, Mapping) else None
    return isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values())
