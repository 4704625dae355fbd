"""Plans: which pairs each rank decodes next, from an index of known pairs or from a stream."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from diffalign import world
from diffalign.data.decoding import Size
from diffalign.data.layout import Layout
from diffalign.data.order import Order, Position
from diffalign.data.skipping import LeftOut, Skipped
from diffalign.data.token_budget import share_out
from diffalign.errors import DataError


@dataclass(frozen=True)
class Work:
    """One visit of a pair, for a worker to decode."""

    pair: Any
    """Number of the pair in its data set, int; the pair itself where the data is streamed."""
    visit: int
    """Number of earlier visits."""
    target: Size | None
    """(height, width) to cut to; None where images keep their size."""


@dataclass(frozen=True)
class PlannedBatch:
    """This rank's part of one global micro-batch: the pairs of a forward pass."""

    works: list[Work]
    """`samples_per_device` of them; where passes are cut by length, all of a step."""
    replacement: Callable[[int, int], Work]
    """(index in `works`, attempt) -> another pair for one that cannot be used."""
    after: dict[str, Any]
    """Position of the plan behind this forward pass of every rank, as far as this one knows it: see
    `AbstractPlan.of_all_ranks`."""
    out_of: int
    """Pairs that the share of unusable ones is taken of."""
    skipped: tuple[Skipped, ...] = ()
    """Pairs that were found unusable on the way here, before decoding."""


class AbstractPlan(abc.ABC):
    """An endless sequence of samples, in global micro-batches."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Counts as a sentence."""

    @abc.abstractmethod
    def start(self, layout: Layout) -> dict[str, Any]:
        """The position before the first sample, of plain JSON values; `samples` counts those that
        all ranks have seen."""

    @abc.abstractmethod
    def left_out(self, position: Mapping[str, Any]) -> dict[str, int]:
        """Rows without a preference by reason: of the data set, or of a stream up to a position."""

    @property
    @abc.abstractmethod
    def known_pairs(self) -> int | None:
        """How many pairs there are, the unusable ones included; None where nobody knows."""

    @abc.abstractmethod
    def check(self, position: Mapping[str, Any]) -> None:
        """Raise DataError for a position of another plan or data set."""

    def of_all_ranks(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """The position that all ranks together know, the same on each; every rank must call."""
        return dict(position)

    @abc.abstractmethod
    def batches(self, position: Mapping[str, Any], layout: Layout) -> Iterator[PlannedBatch]:
        """This rank's parts from a position on, one a forward pass."""

    def most_visits(self, micro_batches: int, size: int) -> int | None:
        """How often that pair is visited which is visited most, in so many global micro-batches of
        so many pairs; None where nobody knows."""
        return None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the rows of a data set are."""

    rows: int
    pairs: int
    """Rows with a preference, the unusable ones included."""
    left_out: Mapping[LeftOut, int]
    held_out: int = 0
    """Pairs that are not trained on."""
    noun: str = "rows"
    """What `rows` counts."""

    def describe(self) -> str:
        """For example `1,200 rows: 1,000 pairs, 150 left out as tie, 50 left out as no label`."""
        left_out = [
            f"{self.left_out.get(reason, 0):,} left out ({reason.value})"
            for reason in LeftOut
            if self.left_out.get(reason, 0)
        ]
        held_out = f" ({self.held_out:,} of them held out)" if self.held_out else ""
        pairs = f"{self.pairs:,} pairs{held_out}"
        return f"{self.rows:,} {self.noun}: " + ", ".join([pairs, *left_out])


@dataclass(frozen=True, kw_only=True)
class HeldOutPair:
    """One pair that is not trained on, see `held_out.py`."""

    number: int
    """As in the members of an index."""
    sample_id: str
    group: str
    """What it was held out by: pairs that share it are no independent evidence."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """The rows of a data set that are pairs, known before the first image is read."""

    members: np.ndarray
    """Numbers of the usable pairs, int64 [n]: of their rows, or of another list of pairs."""
    counts: Counts
    held_out: tuple[HeldOutPair, ...] = ()
    """Usable pairs that are no members."""
    bands: np.ndarray | None = None
    """Which of several bands each member is in, int64 [n], where they are seen one after the other;
    None where all are seen in one random order."""

    def of_held_out(self) -> Index:
        """The index of the pairs that are held out."""
        numbers = np.array([pair.number for pair in self.held_out], dtype=np.int64)
        return Index(members=numbers, counts=self.counts)


class IndexPlan(AbstractPlan):
    """Pairs that are read at random; a position is the number of samples seen.

    Where passes are cut by length, a rank has all its samples of a step at once: those of the step
    are dealt out so that ranks have about as much to compute.
    """

    def __init__(
        self,
        index: Index,
        *,
        run_seed: int,
        buckets: Mapping[Size, np.ndarray] | Mapping[None, np.ndarray],
        passes: int = 1,
        sizes: np.ndarray | None = None,
    ) -> None:
        """Args:
        index: of the data set.
        run_seed: of the run.
        buckets: target size -> indices into `index.members`; None for all, which keep their sizes.
        passes: how often a band of the index is seen before the next one comes.
        sizes: about how much each member takes to compute, [n], in any unit; None for all alike.
        """
        self.index = index
        self._work_of = np.ones(len(index.members)) if sizes is None else sizes
        self._sizes: list[Size | None] = [*buckets]
        self._buckets = list(buckets.values())
        self._order = Order(run_seed, self._buckets, bands=index.bands, passes=passes)

    def describe(self) -> str:
        counts = self.index.counts.describe()
        if self.index.bands is not None:
            sizes = ", ".join(f"{size:,}" for size in np.bincount(self.index.bands))
            counts += f"; seen in bands of {sizes} pairs, one after the other"
        if len(self._sizes) == 1:
            return counts
        targets = [size for size in self._sizes if size is not None]
        return f"{counts}; {len(targets)} buckets of height x width " + ", ".join(
            f"{height}x{width}" for height, width in targets
        )

    def start(self, layout: Layout) -> dict[str, Any]:
        return self._place(0)

    def _place(self, samples: int) -> dict[str, Any]:
        return {"pairs": len(self.index.members), "samples": samples}

    def left_out(self, position: Mapping[str, Any]) -> dict[str, int]:
        return {reason.value: count for reason, count in self.index.counts.left_out.items()}

    @property
    def known_pairs(self) -> int:
        return self.index.counts.pairs

    def check(self, position: Mapping[str, Any]) -> None:
        if set(position) != set(self._place(0)):
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

    def batches(self, position: Mapping[str, Any], layout: Layout) -> Iterator[PlannedBatch]:
        samples = position["samples"]
        if layout.tokens_per_device is not None:
            yield from self._steps(samples, layout)
        for part in layout.own_parts(samples):
            samples = layout.seen_after(samples)
            places = self._positions(part.start, len(part), layout)
            yield self._batch(places, samples)

    def _steps(self, samples: int, layout: Layout) -> Iterator[PlannedBatch]:
        """This rank's share of each step, without end."""
        while True:
            step = self.of_step(samples, layout)
            samples += layout.samples_per_step
            shares = share_out([self._work_of[p.member] for p in step], world.size())
            yield self._batch([step[place] for place in shares[world.rank()]], samples)

    def of_step(self, samples: int, layout: Layout) -> list[Position]:
        """The pairs that all ranks see in the step which begins after so many samples."""
        size, starts = layout.micro_batch, range(0, layout.samples_per_step, layout.micro_batch)
        return [p for start in starts for p in self._positions(samples + start, size, layout)]

    def most_visits(self, micro_batches: int, size: int) -> int:
        return self._order.most_visits(micro_batches, size)

    def visit(self, member: int, visit: int) -> Work | None:
        """A visit of one of the pairs, by its place among them; None where it is in no bucket,
        since it cannot be used."""
        bucket = int(self._bucket_of[member])
        if bucket < 0:
            return None
        return Work(int(self.index.members[member]), visit, self._sizes[bucket])

    @cached_property
    def _bucket_of(self) -> np.ndarray:
        """The bucket of each pair; -1 for none."""
        bucket_of = np.full(len(self.index.members), -1)
        for bucket, members in enumerate(self._buckets):
            bucket_of[members] = bucket
        return bucket_of

    def _positions(self, first: int, count: int, layout: Layout) -> list[Position]:
        """So many places of the endless sequence, within one global micro-batch."""
        number, place = layout.place(first)
        return self._order.micro_batch(number, layout.micro_batch)[place : place + count]

    def _batch(self, positions: list[Position], samples: int) -> PlannedBatch:
        return PlannedBatch(
            works=[self._work(position) for position in positions],
            replacement=lambda place, attempt: self._work(
                self._order.replacement(positions[place], attempt)
            ),
            after=self._place(samples),
            out_of=self.index.counts.pairs,
        )

    def _work(self, position: Position) -> Work:
        return Work(
            int(self.index.members[position.member]),
            position.visit,
            self._sizes[position.bucket],
        )
