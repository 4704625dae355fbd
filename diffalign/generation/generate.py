"""Fill a folder with images, resumably: whatever stops a run, the next one generates what is
missing.

Batches are cut from the whole plan before it is known what is already there. A resumed run
therefore generates every image in the same company as an uninterrupted one would have, and the
files are equal byte for byte, not only up to rounding.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffalign.batching import each_or_error
from diffalign.blocks import AbstractPlan, Block, Do, Failed, Row
from diffalign.errors import CacheError
from diffalign.files import write_atomically
from diffalign.generation.manifest import (
    MANIFEST,
    ItemKey,
    ManifestRow,
    append_rows,
    file_digest,
    read_manifest,
)
from diffalign.generation.models import LocatedModel
from diffalign.generation.prompts import Prompt
from diffalign.imaging.image_files import encode_png


@dataclass(frozen=True)
class Item:
    """One image of the plan, of whichever model."""

    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class Failure:
    """An image that could not be made."""

    item: Item
    reason: str


class Sampler(Protocol):
    """What generates: `TextToImage`, or a test's stand-in."""

    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Images of shape [n, 3, H, W] in [-1, 1], one per prompt and seed."""
        ...


@dataclass(frozen=True)
class ModelEntry:
    """A model as the manifest knows it."""

    name: str
    fingerprint: str
    sampler: Mapping[str, Any]
    """Everything else that shapes its images."""


def plan_batches(
    prompts: Iterable[Prompt], seeds: Sequence[int], batch_size: int
) -> list[list[Item]]:
    """All prompts times all seeds, the images of one prompt together."""
    items = [Item(prompt, seed) for prompt in prompts for seed in seeds]
    return [items[i : i + batch_size] for i in range(0, len(items), batch_size)]


def existing_rows(folder: Path, entries: Iterable[ModelEntry]) -> dict[ItemKey, ManifestRow]:
    """What the folder already holds, if it was generated as this run would generate it.

    Raises:
        CacheError: naming the setting that differs.
    """
    if not (folder / MANIFEST).exists():
        return {}
    fingerprints = {entry.name: entry.fingerprint for entry in entries}
    wanted = next(iter(entries)).sampler
    rows = {row.key: row for row in read_manifest(folder)}
    for row in rows.values():
        for name in wanted.keys() | row.sampler.keys():
            before, now = row.sampler.get(name), wanted.get(name)
            if before != now:
                raise _mismatch(folder, f"sampler.{name} {before!r}", repr(now))
        now = fingerprints.get(row.model, row.fingerprint)
        if now != row.fingerprint:
            raise _mismatch(folder, f"models.{row.model} of fingerprint {row.fingerprint}", now)
    return {key: row for key, row in rows.items() if (folder / row.file).is_file()}


def _mismatch(folder: Path, before: str, now: str) -> CacheError:
    return CacheError(
        f"{folder / MANIFEST} was written with {before}, and this run asks for {now}. "
        "Images made differently are not compared: choose another output folder, or delete "
        "this one"
    )


class ImagesPlan(AbstractPlan):
    """The images of some models, as blocks: a batch of one model each."""

    title = "generate"

    def __init__(
        self,
        folder: Path,
        entries: Sequence[ModelEntry],
        batches: Sequence[list[Item]],
        open_sampler: Callable[[str, str | None], Sampler],
        *,
        device: str = "auto",
        models: Mapping[str, LocatedModel] | None = None,
    ) -> None:
        """Look at what is there already.

        Args:
            folder: gets `images/<model>/<prompt_id>-<seed>.png` and rows in its manifest.
            entries: what the rows say of the models.
            batches: of every model; generated whole, so that an image's company never changes.
            open_sampler: makes what generates, of a model's name and a worker's device.
            device: of the settings.
            models: where the named ones were found, for whoever tells of the plan.

        Raises:
            CacheError: the folder was generated differently; the setting is named.
        """
        self.folder, self.device = folder, device
        self.models = dict(models or {})
        self.entries = {entry.name: entry for entry in entries}
        self.existing = existing_rows(folder, entries)
        self._open_sampler = open_sampler
        works = [(entry, batch) for entry in entries for batch in batches]
        self.blocks = [
            Block.of(place, _content(entry, batch), len(batch), (entry.name, batch))
            for place, (entry, batch) in enumerate(works)
        ]

    def is_done(self, block: Block) -> bool:
        name, batch = block.work
        return all((name, i.prompt.prompt_id, i.seed) in self.existing for i in batch)

    def open(self, device: str | None, upcoming: Sequence[Block]) -> Do:
        opened: tuple[str, Sampler] | None = None

        def do(block: Block) -> list[Row | Failed]:
            nonlocal opened
            name, batch = block.work
            if opened is None or opened[0] != name:
                if opened is not None:  # one model at a time on the device
                    opened = None
                    _free_memory()
                opened = name, self._open_sampler(name, device)
            return self._generate(self.entries[name], opened[1], batch)

        return do

    def _generate(
        self, entry: ModelEntry, sampler: Sampler, batch: Sequence[Item]
    ) -> list[Row | Failed]:
        made: list[Row | Failed] = []
        for item, outcome in _generate_each(sampler, batch):
            if (entry.name, item.prompt.prompt_id, item.seed) in self.existing:
                continue
            row = _write(self.folder, entry, item, outcome)
            made.append(Row(asdict(row)) if isinstance(row, ManifestRow) else row)
        return made

    def merge(self, rows: Sequence[Mapping[str, Any]]) -> None:
        append_rows(self.folder, [ManifestRow(**row) for row in rows])

    def in_words(self, failed: Mapping[str, Any]) -> str:
        name = f"{failed['model']}: " if len(self.entries) > 1 else ""
        return f"{name}{failed['prompt'][:60]!r}, seed {failed['seed']}: {failed['reason']}"


def _content(entry: ModelEntry, batch: Sequence[Item]) -> Any:
    items = [(item.prompt.prompt_id, item.prompt.text, item.seed) for item in batch]
    return entry.name, entry.fingerprint, dict(entry.sampler), items


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _generate_each(
    sampler: Sampler, batch: Sequence[Item]
) -> Iterator[tuple[Item, Tensor | Exception]]:
    return each_or_error(
        lambda items: sampler.generate(
            [item.prompt.text for item in items], [i.seed for i in items]
        ),
        batch,
    )


def _write(
    folder: Path, entry: ModelEntry, item: Item, outcome: Tensor | Exception
) -> ManifestRow | Failed:
    if isinstance(outcome, Exception):
        return _failed(entry, item, f"{type(outcome).__name__}: {outcome}")
    if not torch.isfinite(outcome).all():
        return _failed(entry, item, "the model generated values that are not finite")
    content = encode_png(outcome)
    file = f"images/{entry.name}/{item.prompt.prompt_id}-{item.seed}.png"
    try:
        write_atomically(folder / file, content)
    except OSError as error:
        return _failed(entry, item, f"cannot be written: {error}")
    return ManifestRow(
        model=entry.name,
        prompt=item.prompt.text,
        prompt_id=item.prompt.prompt_id,
        seed=item.seed,
        file=file,
        sha256=file_digest(content),
        fingerprint=entry.fingerprint,
        sampler=dict(entry.sampler),
        categories=dict(item.prompt.categories),
    )


def _failed(entry: ModelEntry, item: Item, reason: str) -> Failed:
    return Failed(
        {
            "model": entry.name,
            "prompt_id": item.prompt.prompt_id,
            "prompt": item.prompt.text,
            "seed": item.seed,
            "reason": reason,
        }
    )
