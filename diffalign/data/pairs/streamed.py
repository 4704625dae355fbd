"""Pairs that are read in order: lanes of parts, in blocks of rows that are shuffled by themselves.

A stream has parts that can be read each by itself: row groups, shards. They are dealt to lanes, and
every lane is an endless stream of its own: its rows in blocks, block b of epoch e of lane l
permuted by (run seed, l, e, b), epoch after epoch. The endless sequence of samples goes from lane
to lane, `turn` samples from each. Lanes and turns follow from the global micro-batch and the step
with which a run starts, and from the number of parts; they stay when it goes on with other
processes. So the samples of a step are the same for every number of processes, while a rank reads
those lanes only that its samples are in: its own share of the stream where the number of processes
divides that of the lanes.

A lane that has come to its end begins its next epoch, whatever the others do. So where lanes are of
unequal length the pairs of the short ones are seen a little more often: a tenth at most, by the
sizes of their parts, or there are fewer lanes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from diffalign import world
from diffalign.data.decoding import Size
from diffalign.data.lanes import cut_into_lanes, deal, lane_of, taken_from
from diffalign.data.layout import Layout
from diffalign.data.pairs.columns import ImagePair
from diffalign.data.pairs.formats.base import OpenedPairs
from diffalign.data.pairs.samples import empty_caption
from diffalign.data.plans import AbstractPlan, PlannedBatch, Work
from diffalign.data.rows import AbstractRowStream, Cursor, Row
from diffalign.data.skipping import LeftOut, Skipped
from diffalign.errors import DataError
from diffalign.seeding import cpu_generator, derive_seed

_FLOOR = 1000
"""The share of bad pairs is taken of at least so many, lest the first bad pair stop the run."""


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Shuffled pairs of consecutive rows."""

    lane: int
    epoch: int
    number: int
    """In its epoch and lane."""
    cursor: Cursor | None
    """Where its rows begin."""
    pairs_before: int
    """Pairs of earlier blocks of the epoch and lane, the unusable ones included."""
    pairs: Sequence[ImagePair]
    """Those with a caption, in the order in which they are seen."""
    skipped: tuple[Skipped, ...]
    """The others."""
    left_out: Mapping[str, int]
    """Rows without a preference, by reason."""

    @property
    def seed_parts(self) -> tuple[int, ...]:
        """Its place, for seeds; that of the first lane as it was when there was but one."""
        lane = (self.lane,) if self.lane else ()
        return (*lane, self.epoch, self.number)

    @property
    def pairs_up_to_here(self) -> int:
        """Pairs of the lane's epoch to the end of this block, the unusable ones included."""
        return self.pairs_before + len(self.pairs) + len(self.skipped)


_Place = tuple[_Block, int]
"""A pair: a block, and an index into its pairs."""
_SMALLEST_BLOCK = 16
"""Rows of a block of a lane, at least: it replaces its own bad pairs."""


class StreamPlan(AbstractPlan):
    """Samples of a stream; a position is where each of its lanes is."""

    def __init__(
        self,
        data: OpenedPairs,
        *,
        run_seed: int,
        block_rows: int,
        limit: int | None,
        target: Size,
    ) -> None:
        """Take the parts.

        Args:
            data: the stream.
            run_seed: of the run.
            block_rows: rows that are shuffled at once, over all lanes.
            limit: of the pairs in the order of the data set; it leaves one lane.
            target: (height, width) to cut to.
        """
        assert isinstance(data.rows, AbstractRowStream)
        self.rows = data.rows
        self.data = data
        self.run_seed = run_seed
        self.limit = limit
        self.target = target
        self._block_rows = block_rows

    def describe(self) -> str:
        parts = len(self.rows.parts)
        return (
            f"rows are counted as they are read, in {parts:,} part{'s' * (parts != 1)} (row groups "
            f"or shards); shuffled in blocks of {self._block_rows:,}"
        )

    def start(self, layout: Layout) -> dict[str, Any]:
        parts = self.rows.parts if self.limit is None else self.rows.parts[:1]
        lanes, turn = cut_into_lanes(layout, parts, held_bytes=self.rows.held_bytes)
        return {
            "samples": 0,
            "parts": len(self.rows.parts),
            "turn": turn,
            "lanes": [dict(_AT_FIRST) for _ in range(lanes)],
        }

    def left_out(self, position: Mapping[str, Any]) -> dict[str, int]:
        """Of the lanes that this rank knows of."""
        return dict(sum((Counter(lane["left_out"]) for lane in position["lanes"]), Counter()))

    @property
    def known_pairs(self) -> None:
        return None

    def check(self, position: Mapping[str, Any]) -> None:
        if "lanes" not in position:
            what = "a stream that was read in one lane" if "block" in position else "a random order"
            raise DataError(
                f"the checkpoint's place in the data is that of {what}, and this run streams in "
                f"lanes: "
                + (
                    "go on with the version that wrote it, or start a new run from its export"
                    if "block" in position
                    else "set data.streaming as it was"
                )
            )
        if position["parts"] != len(self.rows.parts):
            raise DataError(
                f"the checkpoint was written with {position['parts']:,} parts (row groups or "
                f"shards), and the data set has {len(self.rows.parts):,} now: its order would be "
                f"another one. Resume with the same data, or start a new run"
            )

    def of_all_ranks(self, position: Mapping[str, Any]) -> dict[str, Any]:
        everyone = world.gather(position["lanes"])
        furthest = [max(known, key=_progress) for known in zip(*everyone, strict=True)]
        return {**position, "lanes": furthest}

    def batches(self, position: Mapping[str, Any], layout: Layout) -> Iterator[PlannedBatch]:
        samples, turn = position["samples"], position["turn"]
        lanes = list(position["lanes"])
        opened: dict[int, _Lane] = {}
        for part in layout.own_parts(samples):
            samples = layout.seen_after(samples)
            places = []
            for sample in part:
                rounds, (number, within) = lane_of(sample, len(lanes), turn)
                if number not in opened:
                    taken = taken_from(position["samples"], number, len(lanes), turn)
                    opened[number] = _Lane(self, number, lanes, taken, self._rows_at_once(lanes))
                places.append(opened[number].take(rounds * turn + within))
            for number, lane in opened.items():
                lanes[number] = lane.place
            met = sum(lanes[number]["pairs_met"] for number in opened)
            yield self._batch(
                places,
                tuple(pair for lane in opened.values() for pair in lane.take_skipped()),
                {**position, "samples": samples, "lanes": list(lanes)},
                met * len(lanes) // len(opened),
            )

    def _rows_at_once(self, lanes: Sequence[object]) -> int:
        """Rows of a block of each lane."""
        least = min(self._block_rows, _SMALLEST_BLOCK)
        return max(-(-self._block_rows // len(lanes)), least)

    def _batch(
        self,
        places: list[_Place],
        skipped: tuple[Skipped, ...],
        after: dict[str, Any],
        pairs_met: int,
    ) -> PlannedBatch:
        def replacement(place: int, attempt: int) -> Work:
            block, offset = places[place]
            parts = (*block.seed_parts, offset, attempt)
            seed = derive_seed(self.run_seed, "replacement", *parts)
            return self._work(block, seed % len(block.pairs))

        return PlannedBatch(
            works=[self._work(block, offset) for block, offset in places],
            replacement=replacement,
            after=after,
            out_of=max(pairs_met, _FLOOR),
            skipped=skipped,
        )

    def _work(self, block: _Block, offset: int) -> Work:
        return Work(block.pairs[offset], block.epoch, self.target)


_AT_FIRST: Mapping[str, Any] = {
    "epoch": 0,
    "block": 0,
    "cursor": None,
    "pairs_before": 0,
    "offset": 0,
    "pairs_met": 0,
    "left_out": {},
}
"""A lane of which nothing was read."""


class _Lane:
    """The pairs of one lane from a place on, without end."""

    def __init__(
        self,
        plan: StreamPlan,
        number: int,
        lanes: Sequence[Mapping[str, Any]],
        taken: int,
        block_rows: int,
    ) -> None:
        """Args:
        plan: of the stream.
        number: of the lane.
        lanes: where each of them is.
        taken: samples that all ranks have taken from this one.
        block_rows: rows that are shuffled at once.
        """
        self.place = dict(lanes[number])
        """Behind the pair that was taken last."""
        self._plan = plan
        self._number = number
        self._of = len(lanes)
        self._parts = deal(plan.rows.parts, self._of)[number]
        self._taken = taken
        self._block_rows = block_rows
        self._skipped: list[Skipped] = []
        self._pairs = self._endless()

    def take(self, index: int) -> _Place:
        """The pair that is the lane's sample of that number; those before are passed over."""
        while self._taken < index:
            next(self._pairs)
            self._taken += 1
        self._taken += 1
        return next(self._pairs)

    def take_skipped(self) -> list[Skipped]:
        """Pairs that were found unusable since the last call."""
        skipped, self._skipped = self._skipped, []
        return skipped

    def _endless(self) -> Iterator[_Place]:
        while True:
            start, found_any = self.place, False
            counted = start["block"] if start["offset"] else start["block"] - 1
            left_out: Counter[str] = Counter()
            for block in self._blocks(start):
                left_out.update(block.left_out)
                self._open(block, counted)
                for offset in range(start["offset"], len(block.pairs)):
                    found_any = True
                    self.place = {**self.place, "offset": offset + 1}
                    yield block, offset
                start = {**start, "offset": 0}
            if start["cursor"] is None and not found_any:
                self._refuse_nothing(left_out)
            kept = {key: self.place[key] for key in ("pairs_met", "left_out")}
            self.place = {**_AT_FIRST, **kept, "epoch": start["epoch"] + 1}

    def _open(self, block: _Block, counted: int) -> None:
        """Note what has just been read; of the first epoch, up to block `counted` it was before."""
        self._skipped += block.skipped
        left_out = Counter(self.place["left_out"])
        if block.epoch == 0 and block.number > counted:
            left_out.update(block.left_out)
        self.place = {
            **self.place,
            "block": block.number,
            "cursor": block.cursor,
            "pairs_before": block.pairs_before,
            "pairs_met": max(self.place["pairs_met"], block.pairs_up_to_here),
            "left_out": dict(left_out),
        }

    def _refuse_nothing(self, left_out: Mapping[str, int]) -> None:
        counts = ", ".join(f"{n:,} left out ({reason})" for reason, n in left_out.items())
        where, way_out = self._plan.data.summary, ""
        if self._of > 1:
            where = f"lane {self._number + 1} of {self._of} of {where}"
            way_out = (
                ". Every lane needs a pair: write the data in larger row groups or shards, or read "
                "it at random (data.streaming: false)"
            )
        raise DataError(f"there is nothing to train on in {where}: {counts or 'no rows'}{way_out}")

    def _blocks(self, start: Mapping[str, Any]) -> Iterator[_Block]:
        """The blocks of one epoch from a place on."""
        before = start["pairs_before"]
        blocks = _in_blocks(self._rows(start["cursor"]), self._block_rows)
        for number, (cursor, rows) in enumerate(blocks, start=start["block"]):
            if before == self._plan.limit:
                return
            block = self._block(rows, start["epoch"], number, cursor, before)
            before = block.pairs_up_to_here
            yield block

    def _rows(self, start: Cursor | None) -> Iterator[tuple[Cursor, Row]]:
        """Those of one epoch; a cursor is a part and a place in it."""
        parts, within = self._parts, None
        if start is not None:
            parts, within = parts[parts.index(start["part"]) :], start["within"]
        for part in parts:
            for cursor, row in self._plan.rows.rows(part, within):
                yield {"part": part, "within": cursor}, row
            within = None

    def _block(
        self, rows: list[Row], epoch: int, number: int, cursor: Cursor, before: int
    ) -> _Block:
        found = [self._plan.data.read(row) for row in rows]
        pairs = [pair for pair in found if not isinstance(pair, LeftOut)]
        if self._plan.limit is not None:
            pairs = pairs[: self._plan.limit - before]
        checked = [_with_caption(pair) for pair in pairs]
        usable = [pair for pair in checked if isinstance(pair, ImagePair)]
        left_out = Counter(reason.value for reason in found if isinstance(reason, LeftOut))
        skipped = tuple(pair for pair in checked if isinstance(pair, Skipped))
        block = _Block(
            lane=self._number,
            epoch=epoch,
            number=number,
            cursor=cursor,
            pairs_before=before,
            pairs=usable,
            skipped=skipped,
            left_out=left_out,
        )
        generator = cpu_generator(derive_seed(self._plan.run_seed, "block", *block.seed_parts))
        order = torch.randperm(len(usable), generator=generator).tolist()
        return replace(block, pairs=[usable[i] for i in order])


def _progress(lane: Mapping[str, Any]) -> tuple[int, int, int]:
    """Of two places in one lane, the further one has the larger."""
    return lane["epoch"], lane["block"], lane["offset"]


def _with_caption(pair: ImagePair | Skipped) -> ImagePair | Skipped:
    if isinstance(pair, Skipped):
        return pair
    return empty_caption(pair.sample_id, pair.prompt) or pair


def _in_blocks(rows: Iterator[tuple[Cursor, Row]], size: int) -> Iterator[tuple[Cursor, list[Row]]]:
    """Blocks of `size` rows, with the cursor of the first.

    The last one takes in what is left over: a block replaces its own bad pairs, and should have
    some good ones to choose from.
    """
    held: tuple[Cursor, list[Row]] | None = None
    while taken := list(islice(rows, size)):
        block = [row for _, row in taken]
        if held is not None and len(block) < size:
            held[1].extend(block)
            break
        if held is not None:
            yield held
        held = taken[0][0], block
    if held is not None:
        yield held
