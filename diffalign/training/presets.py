"""`preset: 12gb`: settings that a config leaves open, chosen so that the run fits such a card.

A ladder is climbed down from the fastest settings to the smallest; the first rung that fits is
taken, by the same count as `diffalign plan`, with the largest micro-batch that fits there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign import config
from diffalign.errors import ConfigError, ModelError
from diffalign.training.config import RunConfig
from diffalign.training.memory_plan import GIB, MemoryPlan, memory_plan, named_gpu

CARDS = ("8gb", "12gb", "16gb", "24gb", "48gb", "80gb")
_MOST = 16
"""Samples of a micro-batch; more fill no device better."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a preset chose."""

    preset: str
    overrides: tuple[str, ...]
    plan: MemoryPlan

    def describe(self) -> str:
        """One line for the start of a run."""
        chosen = ", ".join(self.overrides) or "nothing, as the config leaves nothing open"
        return (
            f"{self.preset} chose {chosen}: {self.plan.total / GIB:.1f} GiB by count, the first "
            f"settings from the fastest to the smallest that fit {self.plan.target.name}"
        )


def load(path: Path | None, overrides: Sequence[str] = ()) -> tuple[RunConfig, Choice | None]:
    """A run, and what its preset chose; None where it has none.

    The run that comes back has the choice in its settings, and no preset: saved, it is the same run
    again whatever a later version would choose.

    Raises:
        ConfigError: see `config.load`; or nothing on the ladder fits, and what would.
    """
    run = config.load(RunConfig, path, overrides)
    if run.preset is None:
        return run, None
    tree = config.tree(path, overrides)
    target = named_gpu(run.preset)
    smallest: MemoryPlan | None = None
    tried: set[tuple[str, ...]] = set()
    for rung in _ladder(run):
        changes = tuple(f"{key}={value}" for key, value in rung.items() if not _given(tree, key))
        if changes in tried:
            continue
        tried.add(changes)
        try:
            plan = memory_plan(config.load(RunConfig, path, [*overrides, *changes]), target)
        except (ConfigError, ModelError):
            if smallest is None:
                raise  # the run itself cannot be planned
            continue  # what this rung needs is not here
        if smallest is None or plan.total < smallest.total:
            smallest = plan
        if not plan.fits:
            continue
        split = _split(run, tree, plan, path, [*overrides, *changes])
        chosen = (*(c for c in changes if not (split and "samples_per_device" in c)), *split)
        fitted = config.load(RunConfig, path, [*overrides, *chosen, "preset=null"])
        if split:
            plan = memory_plan(fitted, target)
        return fitted, Choice(preset=run.preset, overrides=chosen, plan=plan)
    assert smallest is not None
    need = smallest.total
    larger = [card for card in CARDS if need <= named_gpu(card).capacity]
    card = f"preset {larger[0]} would fit it" if larger else "no preset fits it"
    raise ConfigError(
        f"preset is {run.preset}, and this run takes {need / GIB:.1f} GiB with the smallest "
        f"settings that its config leaves open, of {target.capacity / GIB:.1f}: {card}; or lower "
        f"data.resolution, train a LoRA, or leave open what the config sets "
        f"(training.samples_per_device, model.gradient_checkpointing, model.encoders)"
    )


def _ladder(run: RunConfig) -> Iterator[Mapping[str, Any]]:
    """Settings from the fastest to the smallest."""
    rung: dict[str, Any] = {"training.precision": "bf16", "training.samples_per_device": 1}
    yield dict(rung, **{"model.gradient_checkpointing": "false"})
    rung["model.gradient_checkpointing"] = "true"
    if hasattr(run.model, "images_per_encoding"):
        rung["model.images_per_encoding"] = 1
    yield dict(rung)
    for encoders in ("offload", "cached") if hasattr(run.model, "encoders") else ():
        rung["model.encoders"] = encoders
        yield dict(rung)
    if not run.model.trains_adapter:
        yield dict(rung, **{"optimizer.kind": "adamw_8bit"})
        if run.responses is not None and run.objective.needs_reference:
            rung["reference"] = "cached"  # no frozen copy
            yield dict(rung, **{"optimizer.kind": "adamw_8bit"})
            yield dict(rung, **{"optimizer.kind": "paged_adamw_8bit"})
    elif hasattr(run.model, "quantization"):
        for bits in ("8bit", "4bit"):
            yield dict(rung, **{"model.quantization": bits})


def _split(
    run: RunConfig,
    tree: Mapping[str, Any],
    one: MemoryPlan,
    path: Path | None,
    overrides: Sequence[str],
) -> tuple[str, ...]:
    """The largest micro-batch that fits, and how many of them make the step that was asked for."""
    asked = run.training.accumulation
    if _given(tree, "training.samples_per_device") or asked == 1:
        return ()
    two = memory_plan(
        config.load(RunConfig, path, [*overrides, "training.samples_per_device=2"]), one.target
    )
    each = max(two.total - one.total, 1)
    fitting = 1 + max(one.free, 0) // each
    n = max(d for d in range(1, _MOST + 1) if asked % d == 0 and d <= fitting)
    return (f"training.samples_per_device={n}", f"training.accumulation={asked // n}")


def _given(tree: Mapping[str, Any], key: str) -> bool:
    *parents, last = key.split(".")
    inner: Any = tree
    for parent in parents:
        inner = inner.get(parent) if isinstance(inner, Mapping) else None
    return isinstance(inner, Mapping) and last in inner
