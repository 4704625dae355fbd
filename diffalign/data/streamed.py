"""Pairs that are read in order: blocks of rows, each shuffled by itself.

The stream is cut into blocks of `shuffle_block` rows in the order of the files; block b of epoch e
is permuted by (run seed, e, b), and the blocks follow one another, epoch after epoch. Micro-batches
are taken from that sequence without regard to the ends of blocks. Every rank reads the whole stream
and decodes its own part of each micro-batch: reading costs little beside decoding, and the order
does not depend on the number of ranks. Where it is dear, as over a slow network, read at random
from a local copy instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from diffalign import world
from diffalign.data.plans import AbstractPlan, Counts, PlannedBatch, Work, rank_part
from diffalign.data.reading import OpenedData
from diffalign.data.records import ImagePair, LeftOut
from diffalign.data.rows import AbstractRowStream, Cursor, Row
from diffalign.data.samples import empty_caption
from diffalign.data.skipping import SkipLog
from diffalign.data.transforms import Size
from diffalign.errors import DataError
from diffalign.seeding import cpu_generator, derive_seed

_FLOOR = 1000
"""The share of bad pairs is taken of at least so many, lest the first bad pair stop the run."""


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Shuffled pairs of consecutive rows."""

    epoch: int
    number: int
    """In its epoch."""
    cursor: Cursor | None
    """Where its rows begin."""
    pairs_before: int
    """Pairs of earlier blocks of the epoch, the unusable ones included."""
    pairs: Sequence[ImagePair]
    """In the order in which they are seen."""


class StreamPlan(AbstractPlan):
    """Micro-batches of a stream; a position is a block and how much of it is used up."""

    def __init__(
        self,
        data: OpenedData,
        *,
        run_seed: int,
        block_rows: int,
        limit: int | None,
        target: Size,
        skips: SkipLog,
    ) -> None:
        assert isinstance(data.rows, AbstractRowStream)
        self._rows = data.rows
        self._columns = data.columns
        self._base = data.base
        self._run_seed = run_seed
        self._block_rows = block_rows
        self._limit = limit
        self._target = target
        self._skips = skips
        self._blocks_counted = 0
        self._left_out: Counter[LeftOut] = Counter()
        self._rows_counted = 0
        self._pairs_counted = 0

    @property
    def counts(self) -> Counts:
        """Of the rows read so far by this process, each counted once."""
        return Counts(
            rows=self._rows_counted, pairs=self._pairs_counted, left_out=dict(self._left_out)
        )

    def describe(self) -> str:
        return f"counted as it is read; shuffled within blocks of {self._block_rows:,} rows"

    def start(self) -> dict[str, Any]:
        return {
            "epoch": 0,
            "block": 0,
            "cursor": None,
            "pairs_before": 0,
            "offset": 0,
            "seen": 0,
        }

    @property
    def known_pairs(self) -> None:
        return None

    def check(self, position: Mapping[str, Any]) -> None:
        if set(position) != set(self.start()):
            raise DataError(
                "the checkpoint's place in the data is that of a random order, and this run "
                "streams: set data.streaming as it was"
            )

    def batches(self, position: Mapping[str, Any], pairs_per_device: int) -> Iterator[PlannedBatch]:
        size = pairs_per_device * world.size()
        seen = position["seen"]
        places = self._places(position)
        while True:
            taken = list(islice(places, size))
            block, offset = taken[-1]
            seen += size
            yield self._batch(
                taken[rank_part(pairs_per_device)],
                after={
                    "epoch": block.epoch,
                    "block": block.number,
                    "cursor": block.cursor,
                    "pairs_before": block.pairs_before,
                    "offset": offset + 1,
                    "seen": seen,
                },
            )

    def _batch(self, places: list[tuple[_Block, int]], after: dict[str, Any]) -> PlannedBatch:
        def replacement(place: int, attempt: int) -> Work:
            block, offset = places[place]
            seed = derive_seed(
                self._run_seed, "replacement", block.epoch, block.number, offset, attempt
            )
            return self._work(block, seed % len(block.pairs))

        return PlannedBatch(
            works=[self._work(block, offset) for block, offset in places],
            replacement=replacement,
            after=after,
            out_of=max(after["seen"], _FLOOR),
        )

    def _work(self, block: _Block, offset: int) -> Work:
        return Work(block.pairs[offset], block.epoch, self._target)

    def _places(self, position: Mapping[str, Any]) -> Iterator[tuple[_Block, int]]:
        """Endless (block, index in it) from a position on."""
        while True:
            last = None
            for block in self._blocks(position):
                last = block
                for offset in range(position["offset"], len(block.pairs)):
                    yield block, offset
                position = {**position, "offset": 0}
            if last is None or not (last.pairs_before or last.pairs):
                raise DataError(f"there is nothing to train on in {self.counts.describe()}")
            position = {**self.start(), "epoch": position["epoch"] + 1}

    def _blocks(self, position: Mapping[str, Any]) -> Iterator[_Block]:
        """The blocks of one epoch from a position on."""
        epoch, before = position["epoch"], position["pairs_before"]
        blocks = _without_short_end(
            self._rows.blocks(self._block_rows, position["cursor"]), self._block_rows
        )
        for number, (cursor, rows) in enumerate(blocks, start=position["block"]):
            left = None if self._limit is None else self._limit - before
            if left == 0:
                return
            pairs, used = self._pairs(rows, number, epoch, left)
            yield _Block(
                epoch=epoch,
                number=number,
                cursor=cursor,
                pairs_before=before,
                pairs=self._shuffled(pairs, epoch, number),
            )
            before += used

    def _pairs(
        self, rows: list[Row], number: int, epoch: int, limit: int | None
    ) -> tuple[list[ImagePair], int]:
        """The usable pairs of rows, and how many there are with the unusable ones."""
        found = [self._columns.pair(row, self._base) for row in rows]
        pairs = [pair for pair in found if isinstance(pair, ImagePair)][:limit]
        if epoch == 0 and number == self._blocks_counted:
            self._blocks_counted += 1
            self._rows_counted += len(rows)
            self._pairs_counted += len(pairs)
            self._left_out.update(reason for reason in found if isinstance(reason, LeftOut))
        usable = []
        for pair in pairs:
            skipped = empty_caption(pair.sample_id, pair.prompt)
            if skipped is None:
                usable.append(pair)
            else:
                self._skips.add(skipped)
        return usable, len(pairs)

    def _shuffled(self, pairs: list[ImagePair], epoch: int, number: int) -> list[ImagePair]:
        generator = cpu_generator(derive_seed(self._run_seed, "block", epoch, number))
        return [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]


def _without_short_end(
    blocks: Iterator[tuple[Cursor, list[Row]]], size: int
) -> Iterator[tuple[Cursor, list[Row]]]:
    """Join a last block of fewer rows to the one before: a block replaces its own bad pairs, and
    should have some good ones to choose from."""
    held: tuple[Cursor, list[Row]] | None = None
    for cursor, rows in blocks:
        if held is None:
            held = cursor, rows
        elif len(rows) < size:
            held = held[0], held[1] + rows
        else:
            yield held
            held = cursor, rows
    if held is not None:
        yield held
