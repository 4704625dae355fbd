"""Pairs of known number, read at random: an index over labels and captions, and its plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffalign import world
from diffalign.data.order import Order, Position
from diffalign.data.pairs.columns import PairColumns
from diffalign.data.pairs.records import LeftOut, Skipped, UnusableRowError
from diffalign.data.pairs.samples import empty_caption
from diffalign.data.pairs.transforms import Size
from diffalign.data.plans import AbstractPlan, Counts, PlannedBatch, Work, rank_part
from diffalign.data.rows import AbstractRows
from diffalign.data.skipping import SkipLog
from diffalign.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Index:
    """The rows of a data set that are pairs, known before the first image is read."""

    members: np.ndarray
    """Numbers of the usable pairs, int64 [n]: of their rows, or of another list of pairs."""
    counts: Counts


def index_rows(
    rows: AbstractRows, columns: PairColumns, *, limit: int | None, skips: SkipLog
) -> Index:
    """Read labels and captions of all rows, and no image.

    Raises:
        DataError: a label is not allowed, or no row is a pair.
    """
    left_out: Counter[LeftOut] = Counter()
    members: list[int] = []
    pairs = read = 0
    for number, row in enumerate(rows.scan(columns.light())):
        if limit is not None and pairs == limit:
            break
        read += 1
        skipped: Skipped | None
        try:
            verdict = columns.chosen(row)
            if isinstance(verdict, LeftOut):
                left_out[verdict] += 1
                continue
            skipped = empty_caption(columns.sample_id(row), columns.caption(row))
        except UnusableRowError as error:
            skipped = error.skipped(columns.sample_id(row))
        pairs += 1
        if skipped is None:
            members.append(number)
        else:
            skips.add(skipped)
    counts = Counts(rows=read, pairs=pairs, left_out=left_out, noun=rows.noun)
    if not members:
        unusable = "".join(f"\n  {line}" for line in skips.first(10))
        without = f", none of which can be used:{unusable}" if pairs else ""
        raise DataError(f"there is nothing to train on in {counts.describe()}{without}")
    return Index(members=np.array(members, dtype=np.int64), counts=counts)


class IndexPlan(AbstractPlan):
    """Micro-batches of pairs that are read at random; a position is their number."""

    def __init__(
        self,
        index: Index,
        *,
        run_seed: int,
        buckets: Mapping[Size, np.ndarray] | Mapping[None, np.ndarray],
    ) -> None:
        """Args:
        index: of the data set.
        run_seed: of the run.
        buckets: target size -> indices into `index.members`; None for all, which keep their sizes.
        """
        self.index = index
        self._sizes: list[Size | None] = [*buckets]
        self._order = Order(run_seed, list(buckets.values()))

    def describe(self) -> str:
        counts = self.index.counts.describe()
        if len(self._sizes) == 1:
            return counts
        sizes = [size for size in self._sizes if size is not None]
        return f"{counts}; {len(sizes)} buckets of height x width " + ", ".join(
            f"{height}x{width}" for height, width in sizes
        )

    def start(self) -> dict[str, Any]:
        return {"pairs": len(self.index.members), "micro_batches": 0}

    def left_out(self, position: Mapping[str, Any]) -> dict[str, int]:
        return {reason.value: count for reason, count in self.index.counts.left_out.items()}

    @property
    def known_pairs(self) -> int:
        return self.index.counts.pairs

    def check(self, position: Mapping[str, Any]) -> None:
        if set(position) != set(self.start()):
            raise DataError(
                "the checkpoint's place in the data is that of a stream, and this run reads at "
                "random: set data.streaming as it was"
            )
        if position["pairs"] != len(self.index.members):
            raise DataError(
                f"the checkpoint was written with {position['pairs']:,} usable pairs, and the data "
                f"set has {len(self.index.members):,} now: its order would be another one. "
                "Resume with the same data, or start a new run"
            )

    def batches(self, position: Mapping[str, Any], pairs_per_device: int) -> Iterator[PlannedBatch]:
        number = position["micro_batches"]
        while True:
            yield self._batch(number, pairs_per_device)
            number += 1

    def _batch(self, number: int, pairs_per_device: int) -> PlannedBatch:
        size = pairs_per_device * world.size()
        positions = self._order.micro_batch(number, size)[rank_part(pairs_per_device)]
        return PlannedBatch(
            works=[self._work(position_) for position_ in positions],
            replacement=lambda place, attempt: self._work(
                self._order.replacement(positions[place], attempt)
            ),
            after={**self.start(), "micro_batches": number + 1},
            out_of=self.index.counts.pairs,
        )

    def _work(self, position_: Position) -> Work:
        return Work(
            int(self.index.members[position_.member]),
            position_.visit,
            self._sizes[position_.bucket],
        )
