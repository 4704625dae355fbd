"""What two runs must share for a checkpoint of one to serve the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from diffalign import config, world
from diffalign.config import SHAPES_RUN
from diffalign.training.config import RunConfig
from diffalign.training.reference import resolve_reference


def identity(run: RunConfig) -> dict[str, Any]:
    """The settings that shape the weights of a run, by dotted key, and on how many processes.

    A setting is part of it unless its field says otherwise (`config.MAY_CHANGE`). One rule needs
    two sections: the length of a run shapes its weights where its learning rate depends on it. A
    list is one setting, whatever its parts say.

    Returns:
        Plain JSON values. A round of an online run keeps a digest of them: their order is part of
        the format, that of the config.
    """
    settings = _flatten(config.to_dict(run))
    settings["reference"] = resolve_reference(run)
    settings["processes"] = world.size()
    free = {key for key, metadata in _fields(run) if not metadata.get(SHAPES_RUN, True)}
    if run.optimizer.schedule == "constant":
        free.add("training.optimizer_steps")
    return {key: value for key, value in settings.items() if key not in free}


def _fields(section: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Dotted key and metadata of every field of a config, those of its sections included."""
    if isinstance(section, Mapping):
        for name, value in section.items():
            yield from _fields(value, f"{prefix}{name}.")
    elif dataclasses.is_dataclass(section):
        for field in dataclasses.fields(section):
            yield f"{prefix}{field.name}", field.metadata
            yield from _fields(getattr(section, field.name), f"{prefix}{field.name}.")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
