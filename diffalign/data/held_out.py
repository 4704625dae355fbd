"""Pairs that no run trains on, to see what it learnt beyond those that it does.

Which they are is decided by a digest of their prompt (of responses about images, of the images),
and so is the same for every run, seed and order of the rows; all pairs of one prompt are on one
side. A larger share holds out all that a smaller one does, and more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from diffalign import world
from diffalign.data.decoding import EncodedImage, Size
from diffalign.data.loader import PlannedBatches
from diffalign.data.plans import Counts, HeldOutPair, Work
from diffalign.errors import DataError
from diffalign.seeding import unit_interval

B = TypeVar("B")


def check_share(share: float | None) -> None:
    """Raise ValueError for a share that leaves nothing on one of the sides."""
    if share is not None and not 0 < share < 1:
        raise ValueError(
            f"holdout is a share of the prompts above 0 and below 1, or null for none, got {share}"
        )


def is_held_out(group: str, share: float | None) -> bool:
    """Whether pairs of this prompt are held out; of many prompts, about this share is."""
    return share is not None and _place(group) < share


def refuse_nothing(
    held_out: Sequence[HeldOutPair], share: float | None, counts: Counts, *, section: str
) -> None:
    """Raise DataError where a share is asked for and no prompt falls into it."""
    if share is not None and not held_out:
        raise DataError(
            f"{section}.holdout is {share:g}, and no prompt of {counts.describe()} falls into it: "
            f"a digest of each prompt decides, the same in every run. Raise it, or set it to null"
        )


def group_of_images(images: Sequence[EncodedImage], text: str) -> str:
    """What pairs of responses are held out by: their images, by content or file name, wherever they
    lie; the text of the conversation where there are none."""
    if not images:
        return text
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        content = image.name.encode() if isinstance(image, Path) else image or b""
        digest.update(hashlib.blake2b(content, digest_size=16).digest())
    return digest.hexdigest()


def _place(group: str) -> float:
    return unit_interval("held out", group)


class HeldOut(Generic[B]):
    """Batches of held-out pairs, each pair the same at every call, in this run as in any other."""

    def __init__(
        self,
        batches: PlannedBatches[Any, B],
        pairs: Mapping[Size, Sequence[HeldOutPair]] | Mapping[None, Sequence[HeldOutPair]],
        *,
        per_batch: int,
        finish: Callable[[B], B] = lambda batch: batch,
    ) -> None:
        """Args:
        batches: decode them, with nothing random that a seed of the run decides.
        pairs: (height, width) to cut to, or None -> pairs.
        per_batch: pairs of a batch at most.
        finish: what is left to do for a batch when it comes from a worker.
        """
        self._finish = finish
        self._batches = batches
        self._per_batch = per_batch
        placed = [(size, pair) for size, some in pairs.items() for pair in some]
        self._pairs = sorted(placed, key=lambda each: (_place(each[1].group), each[1].number))
        self._groups = {pair.sample_id: pair.group for _, pair in self._pairs}

    def __len__(self) -> int:
        """How many pairs are held out."""
        return len(self._pairs)

    def group(self, sample_id: str) -> str:
        """What a pair was held out by."""
        return self._groups[sample_id]

    def share_of_rank(self, *, pairs: int, visits: int, rank: int | None = None) -> Iterator[B]:
        """This rank's part of the batches; ranks may have unequally many. What cannot be used is
        left out.

        Args:
            pairs: the first so many, in an order that is the same for every run.
            visits: how often each pair is seen, each time under other noise.
            rank: whose part; None is this one.
        """
        rank = world.rank() if rank is None else rank
        by_size: dict[Size | None, list[Work]] = {}
        for visit in range(visits):
            for size, pair in self._pairs[:pairs]:
                by_size.setdefault(size, []).append(Work(pair.number, visit, size))
        parts = [
            works[start : start + self._per_batch]
            for works in by_size.values()
            for start in range(0, len(works), self._per_batch)
        ]
        return map(self._finish, self._batches.in_parts(parts[rank :: world.size()]))
