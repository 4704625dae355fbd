"""What two runs must share for a checkpoint of one to serve the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from diffalign import config
from diffalign.config import SHAPES_RUN
from diffalign.data.layout import Layout
from diffalign.errors import ConfigError
from diffalign.training.config import RunConfig
from diffalign.training.reference import resolve_reference

_SAMPLES, _ACCUMULATION, _PROCESSES = (
    "training.samples_per_device",
    "training.accumulation",
    "processes",
)
"""Keys of an identity that say how a run was laid out where it started."""


def identity(run: RunConfig, layout: Layout | None = None) -> dict[str, Any]:
    """The settings that shape the weights of a run, by dotted key, and on how many processes it
    started.

    A setting is part of it unless its field says otherwise (`config.MAY_CHANGE`). One rule needs
    two sections: the length of a run shapes its weights where its learning rate depends on it. A
    list is one setting, without what may change in its parts.

    Args:
        run: the config.
        layout: of a run that goes on, perhaps on another number of processes; None is that of a run
            which starts on these.

    Returns:
        Plain JSON values. A round of an online run keeps a digest of them: their order is part of
        the format, that of the config.
    """
    settings = _flatten(config.to_dict(run))
    settings["reference"] = resolve_reference(run)
    layout = layout or start_of(run)
    settings[_SAMPLES] = layout.micro_batch // layout.processes
    settings[_ACCUMULATION] = layout.micro_batches
    settings[_PROCESSES] = layout.processes
    free = {key for key, metadata in _fields(run) if not metadata.get(SHAPES_RUN, True)}
    if run.optimizer.schedule == "constant":
        free.add("training.optimizer_steps")
    within = tuple(f"{key}." for key in free)
    return {
        key: _shaping(value, key, free)
        for key, value in settings.items()
        if key not in free and not key.startswith(within)
    }


def start_of(run: RunConfig) -> Layout:
    """The layout of a run that starts on these processes."""
    training = run.training
    return Layout.start(
        samples_per_device=training.samples_per_device,
        accumulation=training.accumulation,
        tokens_per_device=training.tokens_per_device,
    )


def layout_of(run: RunConfig, saved: Mapping[str, Any] | None) -> Layout:
    """How the samples of a run are shared among the processes of now.

    Args:
        run: the config.
        saved: the identity in the checkpoint that it goes on from; None where it starts.

    Raises:
        ConfigError: its steps cannot be cut for these processes, or the accumulation that is asked
            for would make them larger or smaller.
    """
    now = start_of(run)
    if saved is None or not {_SAMPLES, _ACCUMULATION, _PROCESSES} <= saved.keys():
        return now
    samples, accumulation, processes = saved[_SAMPLES], saved[_ACCUMULATION], saved[_PROCESSES]
    if (samples, processes) == (now.samples_per_device, now.processes):
        return now
    layout = Layout(
        samples_per_device=samples,
        micro_batch=samples * processes,
        micro_batches=accumulation,
        processes=processes,
        tokens_per_device=now.tokens_per_device,
    ).on_these_processes(now.samples_per_device)
    if run.training.accumulation not in (accumulation, layout.accumulation):
        raise ConfigError(
            f"training.accumulation is {run.training.accumulation}, and an optimiser step of this "
            f"run stays {layout.samples_per_step} samples: {layout.accumulation} accumulated on "
            f"{now.processes} processes. Leave it at {accumulation}, as the run started"
        )
    return layout


def _fields(section: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Dotted key and metadata of every field of a config, those of its sections included."""
    if isinstance(section, Mapping):
        for name, value in section.items():
            yield from _fields(value, f"{prefix}{name}.")
    elif dataclasses.is_dataclass(section):
        for field in dataclasses.fields(section):
            yield f"{prefix}{field.name}", field.metadata
            yield from _fields(getattr(section, field.name), f"{prefix}{field.name}.")
    elif isinstance(section, (list, tuple)):
        for place, part in enumerate(section):
            yield from _fields(part, f"{prefix}{place}.")


def _shaping(value: Any, key: str, free: Collection[str]) -> Any:
    """A setting, and of the parts of a list what is not free."""
    if isinstance(value, list):
        return [_shaping(part, f"{key}.{place}", free) for place, part in enumerate(value)]
    if isinstance(value, dict):
        return {
            name: _shaping(part, f"{key}.{name}", free)
            for name, part in value.items()
            if f"{key}.{name}" not in free
        }
    return value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
