"""The part of `diffalign generate` that generates groups of images for people to rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffalign import components
from diffalign import config as configs
from diffalign.blocks import AbstractPlan, Block, Do, Failed, Row
from diffalign.commands import command
from diffalign.errors import ConfigError
from diffalign.files import write_image
from diffalign.generation.generate import Failure, Item
from diffalign.generation.models import ModelSpec, diffusion_settings
from diffalign.imaging.grid import GridCell, GridRow, evenly_spaced, render_grid
from diffalign.imaging.image_files import read_image
from diffalign.models.devices import choose_device, precision_of
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.rollouts.groups import (
    GROUPS,
    Group,
    GroupSampler,
    GroupsConfig,
    Origin,
    group_id,
    list_groups,
    read_groups,
)


class GroupsPlan(AbstractPlan):
    """Groups to generate, as blocks: those that are generated at once."""

    title, unit = "groups", "groups"

    def __init__(
        self,
        spec: ModelSpec,
        settings: GroupsConfig,
        items: Sequence[Item],
        *,
        output: Path,
        batch_size: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        """Find the model and what it has already generated; no weights are read.

        Args:
            spec: the model.
            settings: of groups.
            items: a group each.
            output: their folder.
            batch_size: images generated at once; a group is never divided.
            dtype: in which the model computes, as `training.precision` will.
            device: of the settings.

        Raises:
            ConfigError: the model's steps under these settings have no density to learn from.
            CacheError: the folder was generated in another way.
        """
        self.folder, self.device, self._dtype = output, device, dtype
        self.model = diffusion_settings(spec)
        try:
            settings.process.check(self.model.noising())
        except ValueError as error:
            raise ConfigError(f"trajectories.process: {error}") from error
        origin = Origin.of(self.model, settings.process)
        self.sampler = GroupSampler(settings, origin, precision_of(dtype))
        self.existing = self.sampler.existing(output)
        size = max(1, batch_size // settings.images_per_group)
        content = [asdict(origin), configs.to_dict(settings), self.sampler.dtype]
        batches = [items[i : i + size] for i in range(0, len(items), size)]
        self.blocks = [
            Block.of(place, [*content, list(map(_named, batch))], len(batch), batch)
            for place, batch in enumerate(batches)
        ]

    def is_done(self, block: Block) -> bool:
        return all(group_id(item) in self.existing for item in block.work)

    def open(self, device: str | None, upcoming: Sequence[Block]) -> Do:
        place = choose_device(device or self.device)
        model = self.model.load(
            device=place, compute_dtype=self._dtype, reference="none", trainable=False
        )

        def do(block: Block) -> list[Row | Failed]:
            found = self.sampler.generate(self.folder, model, block.work, self.existing)
            return [
                Row(asdict(each)) if isinstance(each, Group) else _failed(each) for each in found
            ]

        return do

    def merge(self, rows: Sequence[Mapping[str, Any]]) -> None:
        list_groups(self.folder, rows)

    def in_words(self, failed: Mapping[str, Any]) -> str:
        return f"{failed['prompt'][:60]!r}, seed {failed['seed']}: {failed['reason']}"

    def describe(self, pending: int) -> str:
        """A line for people.

        Args:
            pending: groups that are to be generated.
        """
        settings = self.sampler.settings
        process, images = settings.process, settings.images_per_group
        return (
            f"[bold]generate[/bold]  {pending} groups of {images} images ({len(self.existing)} "
            f"already there), {process.steps} steps, guidance {process.guidance:g}, eta "
            f"{process.eta:g}, {choose_device(self.device)}, {self.sampler.dtype}"
        )


def _named(item: Item) -> list[Any]:
    return [item.prompt.prompt_id, item.prompt.text, item.seed]


def _failed(failure: Failure) -> Failed:
    item = failure.item
    return Failed({"prompt": item.prompt.text, "seed": item.seed, "reason": failure.reason})


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
        f"Next: have people rank the groups on a page, which writes "
        f"{folder / 'preferences.jsonl'}\n"
        f"  {command('label', {'output': folder}, config=folder)}\n"
        f"or write a line of JSON on each group of {folder / GROUPS} yourself, best first, ties in "
        f"a list of their own, undecided ones left out\n"
        f"  {ranking}\n"
        f"or which are good and which are bad\n"
        f"  {labels}\n"
        f"Then train on it:\n"
        f"  {command('train', settings, config='configs/d3po/sd15_feedback.yaml')}"
    )
