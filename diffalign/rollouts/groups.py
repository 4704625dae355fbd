"""Groups of images for people to rank, with the trajectories that training on their word needs.

    groups.jsonl                     one line a group
    images/GROUP-0.png ...           what people see; the number is the image's index
    trajectories/GROUP.safetensors   how each of them came about, see `rollouts.trajectories`

A group's images start from the same noise. Its trajectories name what generated them, since the
density of their steps means nothing under another model, schedule or guidance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch

from diffalign.errors import CacheError, DataError
from diffalign.files import (
    add_json_lines,
    inside,
    open_tensors,
    read_rows,
    write_atomically,
    writing,
)
from diffalign.generation.generate import Failure, Item
from diffalign.imaging.image_files import encode_png
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.parsing import checked, parse_json
from diffalign.ranges import AtLeast, Ranged
from diffalign.rollouts.round_order import Visit
from diffalign.rollouts.sampler import Trajectories
from diffalign.rollouts.trajectories import (
    LOG_LIKELIHOODS,
    finite,
    sample_groups,
    write_trajectories,
)
from diffalign.seeding import derive_seed
from diffalign.shapes import check_image_size

GROUPS = "groups.jsonl"
"""The list of groups, in their folder."""

_HEADER = "diffalign"
"""Key of the header of a file of trajectories. It is the only one: safetensors writes several in
any order, and files of equal content would differ."""


@dataclass(frozen=True, kw_only=True)
class GroupsConfig(Ranged):
    """Groups of images from one start noise each, and how they are generated."""

    images_per_group: Annotated[int, AtLeast(2, "one has none to be compared with")] = 7
    """How many a person compares; 7 in D3PO's scripts/sample.py."""
    process: ReverseProcess = field(default_factory=ReverseProcess)
    """Must be `likelihood.process` of the training."""
    size: tuple[int, int] | None = None
    """Height and width of the images in pixels; null is the network's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_image_size(self.size)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The process that gives the steps of a trajectory their density."""

    policy: str
    """Fingerprint of network, adapter and text encoders."""
    prediction: str
    """`epsilon` or `velocity`."""
    schedule: str
    """Digest of the noise schedule."""
    timestep_spacing: str
    steps_offset: int
    steps: int
    guidance: float
    eta: float

    @classmethod
    def of(cls, model: AbstractDiffusion, process: ReverseProcess) -> Origin:
        """That of trajectories which this model begins with, before its weights are read."""
        noising = model.noising().variance_preserving()
        schedule = noising.alphas_cumprod.numpy().tobytes()
        return cls(
            policy=model.policy_fingerprint(),
            prediction=type(noising).__name__.lower(),
            schedule=hashlib.blake2b(schedule, digest_size=8).hexdigest(),
            timestep_spacing=noising.timestep_spacing,
            steps_offset=noising.steps_offset,
            **asdict(process),
        )

    def first_difference(self, other: Origin) -> str | None:
        """Name of a field in which two origins differ."""
        names = (f.name for f in fields(self))
        return next((name for name in names if getattr(self, name) != getattr(other, name)), None)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One line of the list."""

    group: str
    """Its id: that of the prompt, and the seed."""
    prompt: str
    prompt_id: str
    seed: int
    images: Sequence[str]
    """Files by index, relative to the list's folder."""
    trajectories: str
    """File, likewise; trajectory i generated image i."""


def group_id(item: Item) -> str:
    """The id of the group of a prompt and a seed."""
    return f"{item.prompt.prompt_id}-{item.seed}"


def read_groups(folder: Path) -> list[Group]:
    """All groups, in the order of generating.

    Raises:
        DataError: there is no list, or a line of it is not one of ours.
    """
    path = folder / GROUPS
    if not path.is_file():
        raise DataError(
            f"{folder}: there is no {GROUPS} in this folder; diffalign generate writes one where "
            f"its config has a trajectories section"
        )
    rows = read_rows(Group, path)
    return list({row.group: row for row in rows}.values())


def read_origin(folder: Path, group: Group) -> Origin:
    """The model and settings that generated the trajectories of a group.

    Raises:
        DataError: the file is gone, damaged, or not one of ours.
    """
    return _read_header(inside(folder, group.trajectories)).origin


def refuse_edited(folder: Path, group: Group) -> None:
    """Raise DataError unless the file of trajectories is of this very group.

    A line from which an image was taken away would give every later image another's steps.
    """
    path = inside(folder, group.trajectories)
    header = _read_header(path)
    with open_tensors(path) as file:
        _, rows = file.get_slice(LOG_LIKELIHOODS).get_shape()
    for what, generated, listed in (
        ("images", rows, len(group.images)),
        ("prompt", header.prompt, group.prompt),
        ("seed", header.seed, group.seed),
    ):
        if generated != listed:
            raise DataError(
                f"{folder / GROUPS}: the line of group {group.group} says {what} {listed!r}, and "
                f"its trajectories were generated with {generated!r}. Put the line back as it "
                f"was; a group "
                f"that shall not count is left out of the preferences"
            )


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The metadata of a file of trajectories."""

    origin: Origin
    dtype: str
    size: tuple[int, int] | None
    prompt: str
    seed: int


def _read_header(path: Path) -> _Header:
    """The metadata of a file of trajectories."""
    try:
        with open_tensors(path) as file:
            header = file.metadata()[_HEADER]
        return checked(_Header, parse_json(header, path), path)
    except DataError as error:
        raise DataError(
            f"{path}: is no file of trajectories of this version ({error}). Delete it, "
            f"and generate it again with the command that generated the folder"
        ) from error


@dataclass(frozen=True)
class GroupSampler:
    """One model with one way of generating groups."""

    settings: GroupsConfig
    origin: Origin
    dtype: str

    def existing(self, folder: Path) -> dict[str, Group]:
        """The groups that a folder already holds, by id, if they were generated in this way.

        Raises:
            CacheError: naming the setting that differs.
        """
        if not (folder / GROUPS).exists():
            return {}
        found = {}
        for group in read_groups(folder):
            if all(inside(folder, file).is_file() for file in (*group.images, group.trajectories)):
                self._refuse_other(folder, group)
                found[group.group] = group
        return found

    def _refuse_other(self, folder: Path, group: Group) -> None:
        header = _read_header(inside(folder, group.trajectories))
        before = {
            **asdict(header.origin),
            "dtype": header.dtype,
            "size": header.size,
            "images_per_group": len(group.images),
        }
        now = {
            **asdict(self.origin),
            "dtype": self.dtype,
            "size": self.settings.size,
            "images_per_group": self.settings.images_per_group,
        }
        for name, value in now.items():
            if before[name] != value:
                raise CacheError(
                    f"{folder / GROUPS} was written with {name} {before[name]!r}, and this run "
                    f"asks for {value!r}. Groups generated differently do not train together: "
                    f"choose "
                    f"another output folder, or delete this one"
                )

    def generate(
        self,
        folder: Path,
        model: DiffusionModel,
        batch: Sequence[Item],
        existing: Mapping[str, Group],
    ) -> list[Group | Failure]:
        """Generate and write groups; `list_groups` lists them.

        Args:
            folder: gets images and trajectories.
            model: of `origin`.
            batch: generated whole, so that a group's company never changes.
            existing: groups that are there and stay as they are.

        Returns:
            The groups that were not there, in order; or why the model could not generate them.
        """
        images = self.settings.images_per_group
        generated = sample_groups(
            model,
            self.settings.process,
            [_visit(item) for item in batch],
            images=images,
            size=self.settings.size,
        )
        return [
            self._write(folder, model, item, generated.part(place * images, (place + 1) * images))
            for place, item in enumerate(batch)
            if group_id(item) not in existing
        ]

    def _write(
        self, folder: Path, model: DiffusionModel, item: Item, generated: Trajectories
    ) -> Group | Failure:
        images = model.autoencoder.decode(generated.latents[-1]).cpu()
        if not all(finite(generated)) or not torch.isfinite(images).all():
            return Failure(item, model.blame() or "the model generated values that are not finite")
        name = group_id(item)
        group = Group(
            group=name,
            prompt=item.prompt.text,
            prompt_id=item.prompt.prompt_id,
            seed=item.seed,
            images=[f"images/{name}-{i}.png" for i in range(len(images))],
            trajectories=f"trajectories/{name}.safetensors",
        )
        with writing(folder):
            for file, image in zip(group.images, images, strict=True):
                write_atomically(folder / file, encode_png(image))
        header = {
            "origin": asdict(self.origin),
            "dtype": self.dtype,
            "size": self.settings.size,
            "prompt": item.prompt.text,
            "seed": item.seed,
        }
        write_trajectories(folder / group.trajectories, generated, **{_HEADER: json.dumps(header)})
        return group


def list_groups(folder: Path, groups: Iterable[Mapping[str, Any]]) -> None:
    """Add groups, as JSON has them, to the list of a folder: all or none."""
    add_json_lines(folder / GROUPS, groups)


def _visit(item: Item) -> Visit:
    return Visit(item.prompt.text, derive_seed("group", item.prompt.text, item.seed))
