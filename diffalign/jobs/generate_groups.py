"""The part of `diffalign generate` that generates groups of images for people to rank."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from diffalign import components
from diffalign.commands import command
from diffalign.console import progress
from diffalign.errors import ConfigError
from diffalign.files import write_image
from diffalign.generation.generate import Failure, Item
from diffalign.generation.models import ModelSpec, diffusion_settings
from diffalign.imaging.grid import GridCell, GridRow, evenly_spaced, render_grid
from diffalign.imaging.image_files import read_image
from diffalign.models.devices import precision_of
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.rollouts.groups import (
    GROUPS,
    Group,
    GroupSampler,
    GroupsConfig,
    Origin,
    group_id,
    read_groups,
)


@dataclass(frozen=True)
class GroupPlan:
    """Groups to generate, and the model that does."""

    model: AbstractDiffusion
    sampler: GroupSampler
    existing: Mapping[str, Group]
    """Groups that are there, by id."""
    missing: Sequence[Sequence[Item]]
    """The batches of which at least one group is not there."""


def plan(
    spec: ModelSpec,
    settings: GroupsConfig,
    items: Sequence[Item],
    *,
    output: Path,
    batch_size: int,
    dtype: torch.dtype,
) -> GroupPlan:
    """Find the model and what it has already generated; no weights are read.

    Args:
        spec: the model.
        settings: of groups.
        items: a group each.
        output: their folder.
        batch_size: images generated at once; a group is never divided.
        dtype: in which the model computes, as `training.precision` will.

    Raises:
        ConfigError: the model's steps under these settings have no density to learn from.
        CacheError: the folder was generated in another way.
    """
    model = diffusion_settings(spec)
    try:
        settings.process.check(model.noising())
    except ValueError as error:
        raise ConfigError(f"trajectories.process: {error}") from error
    sampler = GroupSampler(settings, Origin.of(model, settings.process), precision_of(dtype))
    existing = sampler.existing(output)
    size = max(1, batch_size // settings.images_per_group)
    batches = [items[i : i + size] for i in range(0, len(items), size)]
    missing = [b for b in batches if any(group_id(item) not in existing for item in b)]
    return GroupPlan(model, sampler, existing, missing)


def generate(
    console: Console,
    plan: GroupPlan,
    *,
    output: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Failure]:
    """Generate the groups that are missing; returns those that could not be generated."""
    settings = plan.sampler.settings
    process, images = settings.process, settings.images_per_group
    groups = sum(map(len, plan.missing))
    console.print(
        f"[bold]generate[/bold]  {groups} groups of {images} images ({len(plan.existing)} already "
        f"there), {process.steps} steps, guidance {process.guidance:g}, eta {process.eta:g}, "
        f"{device}, {plan.sampler.dtype}",
        soft_wrap=True,
    )
    if not plan.missing:
        return []
    model = plan.model.load(device=device, compute_dtype=dtype, reference="none", trainable=False)
    with progress(console, "groups", groups * images) as advance:
        failures = plan.sampler.generate(output, model, plan.missing, plan.existing, advance)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return failures


def render_groups_grid(folder: Path, items: Sequence[Item], *, rows: int) -> Path | None:
    """Write `grid.png`: groups down, images across under their indices.

    Args:
        folder: of the groups.
        items: all of them; evenly spaced ones are shown.
        rows: how many.

    Returns:
        The file; None if there is no group.
    """
    if not (folder / GROUPS).exists():
        return None
    groups = {group.group: group for group in read_groups(folder)}
    there = [groups[name] for name in map(group_id, items) if name in groups]
    if not there:
        return None
    shown = evenly_spaced(there, rows)
    cells = [
        GridRow(
            caption=group.prompt,
            note=group.group,
            cells=[GridCell(image=read_image(folder / file)) for file in group.images],
        )
        for group in shown
    ]
    path = folder / "grid.png"
    write_image(path, render_grid(cells, [str(i) for i in range(len(shown[0].images))]))
    return path


def next_step(folder: Path, model: AbstractDiffusion, process: ReverseProcess) -> str:
    """How people rank the groups: an example of a preferences file, and the command.

    Args:
        folder: of the groups.
        model: what generated them, and is to be trained.
        process: how; a step has a density under the same one alone.
    """
    settings = {
        "rollouts.trajectories": folder,
        "rollouts.preferences": folder / "preferences.jsonl",
        "likelihood.process": asdict(process),
        "model": {
            "kind": components.kind_of(model),
            **{name: getattr(model, name) for name in ("path", "revision", "variant", "config")},
            "lora": model.lora.continuing(model.lora.start) if model.lora else {"rank": 4},
        },
        "output": folder.with_name(f"{folder.name}-trained"),
    }
    groups = read_groups(folder)
    name = groups[0].group if groups else "GROUP"
    ranking = json.dumps({"group": name, "ranking": [3, 0, [1, 2]]})
    labels = json.dumps({"group": name, "good": [0, 3], "bad": [1]})
    return (
        f"Next: look at the images of each group of {folder / GROUPS}, and write a line of JSON on "
        f"each into {folder / 'preferences.jsonl'}, best first, ties in a list of their own, "
        f"undecided ones left out\n"
        f"  {ranking}\n"
        f"or which are good and which are bad\n"
        f"  {labels}\n"
        f"Then train on it:\n"
        f"  {command('train', settings, config='configs/d3po/sd15_feedback.yaml')}"
    )
