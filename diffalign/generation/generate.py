"""Fill a folder with images, resumably: whatever stops a run, the next one generates what is
missing.

Batches are cut from the whole plan before it is known what is already there. A resumed run
therefore generates every image in the same company as an uninterrupted one would have, and the
files are equal byte for byte, not only up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffalign.batching import each_or_error
from diffalign.errors import CacheError, DiffalignError
from diffalign.files import write_atomically
from diffalign.generation.manifest import (
    MANIFEST,
    ItemKey,
    ManifestRow,
    append_rows,
    file_digest,
    read_manifest,
)
from diffalign.generation.prompts import Prompt
from diffalign.imaging.image_files import encode_png

_FAILURES_IN_A_ROW = 16
"""So many failures without a success between them are not bad prompts: the run stops."""


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


def missing_batches(
    batches: Iterable[list[Item]], model: str, existing: Mapping[ItemKey, ManifestRow]
) -> list[list[Item]]:
    """The batches of which at least one image is not there."""
    return [
        batch
        for batch in batches
        if any((model, item.prompt.prompt_id, item.seed) not in existing for item in batch)
    ]


def generate_batches(
    folder: Path,
    entry: ModelEntry,
    sampler: Sampler,
    batches: Iterable[list[Item]],
    existing: Mapping[ItemKey, ManifestRow],
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[Failure]:
    """Generate, write and list the images of one model.

    Args:
        folder: gets `images/<model>/<prompt_id>-<seed>.png` and rows in its manifest.
        entry: what the rows say of the model.
        sampler: generates.
        batches: from `missing_batches`; generated whole, so that an image's company never changes.
        existing: images that are there and stay as they are.
        on_batch: told how many images a finished batch held.

    Returns:
        The images that could not be generated or written; all others are safe.

    Raises:
        DiffalignError: image after image fails; what is written stays, and a next run goes on.
    """
    failures: list[Failure] = []
    in_a_row = 0
    for batch in batches:
        rows = []
        for item, outcome in _generate_each(sampler, batch):
            key = (entry.name, item.prompt.prompt_id, item.seed)
            if key in existing:
                continue
            row = _write(folder, entry, item, outcome)
            if isinstance(row, ManifestRow):
                rows.append(row)
                in_a_row = 0
            else:
                failures.append(row)
                in_a_row += 1
        append_rows(folder, rows)
        if in_a_row >= _FAILURES_IN_A_ROW:
            raise DiffalignError(
                f"{entry.name}: {in_a_row} images in a row failed, the last with: "
                f"{failures[-1].reason}. What was generated is in {folder}; fix this and run again"
            )
        on_batch(len(batch))
    return failures


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
) -> ManifestRow | Failure:
    if isinstance(outcome, Exception):
        return Failure(item, f"{type(outcome).__name__}: {outcome}")
    if not torch.isfinite(outcome).all():
        return Failure(item, "the model generated values that are not finite")
    content = encode_png(outcome)
    file = f"images/{entry.name}/{item.prompt.prompt_id}-{item.seed}.png"
    try:
        write_atomically(folder / file, content)
    except OSError as error:
        return Failure(item, f"cannot be written: {error}")
    return ManifestRow(
        model=entry.name,
        prompt=item.prompt.text,
        prompt_id=item.prompt.prompt_id,
        seed=item.seed,
        file=file,
        sha256=file_digest(content),
        fingerprint=entry.fingerprint,
        sampler=dict(entry.sampler),
    )
