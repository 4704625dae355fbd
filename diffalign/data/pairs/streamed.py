"""Pairs that are read in order: blocks of rows, each shuffled by itself.

The stream is cut into blocks of `shuffle_block` rows in the order of the files; block b of epoch e
is permuted by (run seed, e, b), and the blocks follow one another, epoch after epoch. Micro-batches
are taken from that sequence without regard to the ends of blocks. Every rank reads the whole stream
and decodes its own part of each micro-batch: reading costs little next to decoding, and the order
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

from diffalign.data.decoding import Size
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

    epoch: int
    number: int
    """In its epoch."""
    cursor: Cursor | None
    """Where its rows begin."""
    pairs_before: int
    """Pairs of earlier blocks of the epoch, the unusable ones included."""
    pairs: Sequence[ImagePair]
    """Those with a caption, in the order in which they are seen."""
    skipped: tuple[Skipped, ...]
    """The others."""
    left_out: Mapping[str, int]
    """Rows without a preference, by reason."""

    @property
    def pairs_up_to_here(self) -> int:
        """Pairs of the epoch to the end of this block, the unusable ones included."""
        return self.pairs_before + len(self.pairs) + len(self.skipped)


_Place = tuple[_Block, int]
"""A pair: a block, and an index into its pairs."""

_OPENED = -1
"""In place of an index: the block has just been read."""


class StreamPlan(AbstractPlan):
    """Micro-batches of a stream; a position is a block and how much of it is used up."""

    def __init__(
        self,
        data: OpenedPairs,
        *,
        run_seed: int,
        block_rows: int,
        limit: int | None,
        target: Size,
    ) -> None:
        assert isinstance(data.rows, AbstractRowStream)
        self._rows = data.rows
        self._data = data
        self._summary = data.summary
        self._run_seed = run_seed
        self._block_rows = block_rows
        self._limit = limit
        self._target = target

    def describe(self) -> str:
        return f"rows are counted as they are read; shuffled in blocks of {self._block_rows:,}"

    def start(self) -> dict[str, Any]:
        return {
            "samples": 0,
            "epoch": 0,
            "block": 0,
            "cursor": None,
            "pairs_before": 0,
            "offset": 0,
            "pairs_met": 0,
            "left_out": {},
        }

    def left_out(self, position: Mapping[str, Any]) -> dict[str, int]:
        return dict(position["left_out"])

    @property
    def known_pairs(self) -> None:
        return None

    def check(self, position: Mapping[str, Any]) -> None:
        if set(position) != set(self.start()):
            raise DataError(
                "the checkpoint's place in the data is that of a random order, and this run "
                "streams: set data.streaming as it was"
            )

    def batches(self, position: Mapping[str, Any], layout: Layout) -> Iterator[PlannedBatch]:
        samples, parts = position["samples"], layout.own_parts(position["samples"])
        size = layout.seen_after(samples) - samples
        pairs_met, left_out = position["pairs_met"], Counter(position["left_out"])
        counted = position["block"] if position["offset"] else position["block"] - 1
        taken: list[_Place] = []
        skipped: list[Skipped] = []
        for block, offset in self._places(position):
            if offset == _OPENED:
                skipped += block.skipped
                pairs_met = max(pairs_met, block.pairs_up_to_here)
                if block.epoch == 0 and block.number > counted:
                    left_out.update(block.left_out)
                continue
            taken.append((block, offset))
            if len(taken) < size:
                continue
            own = next(parts)
            places = taken[own.start - samples : own.stop - samples]
            samples += size
            after = {
                "samples": samples,
                "epoch": block.epoch,
                "block": block.number,
                "cursor": block.cursor,
                "pairs_before": block.pairs_before,
                "offset": offset + 1,
                "pairs_met": pairs_met,
                "left_out": dict(left_out),
            }
            yield self._batch(places, tuple(skipped), after)
            taken, skipped = [], []

    def _batch(
        self, places: list[_Place], skipped: tuple[Skipped, ...], after: dict[str, Any]
    ) -> PlannedBatch:
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
            out_of=max(after["pairs_met"], _FLOOR),
            skipped=skipped,
        )

    def _work(self, block: _Block, offset: int) -> Work:
        return Work(block.pairs[offset], block.epoch, self._target)

    def _places(self, position: Mapping[str, Any]) -> Iterator[_Place]:
        """Endless from a position on; before the pairs of a block, if any, a notice of it."""
        while True:
            found_any = False
            left_out: Counter[str] = Counter()
            for block in self._blocks(position):
                left_out.update(block.left_out)
                yield block, _OPENED
                for offset in range(position["offset"], len(block.pairs)):
                    found_any = True
                    yield block, offset
                position = {**position, "offset": 0}
            if position["cursor"] is None and not found_any:
                counts = ", ".join(f"{n:,} left out ({reason})" for reason, n in left_out.items())
                raise DataError(
                    f"there is nothing to train on in {self._summary}: {counts or 'no rows'}"
                )
            position = {**self.start(), "epoch": position["epoch"] + 1}

    def _blocks(self, position: Mapping[str, Any]) -> Iterator[_Block]:
        """The blocks of one epoch from a position on."""
        before = position["pairs_before"]
        blocks = _in_blocks(self._rows.rows(position["cursor"]), self._block_rows)
        for number, (cursor, rows) in enumerate(blocks, start=position["block"]):
            if before == self._limit:
                return
            block = self._block(rows, position["epoch"], number, cursor, before)
            before = block.pairs_up_to_here
            yield block

    def _block(
        self, rows: list[Row], epoch: int, number: int, cursor: Cursor, before: int
    ) -> _Block:
        found = [self._data.read(row) for row in rows]
        pairs = [pair for pair in found if not isinstance(pair, LeftOut)]
        if self._limit is not None:
            pairs = pairs[: self._limit - before]
        checked = [_with_caption(pair) for pair in pairs]
        usable = [pair for pair in checked if isinstance(pair, ImagePair)]
        generator = cpu_generator(derive_seed(self._run_seed, "block", epoch, number))
        order = torch.randperm(len(usable), generator=generator).tolist()
        return _Block(
            epoch=epoch,
            number=number,
            cursor=cursor,
            pairs_before=before,
            pairs=[usable[i] for i in order],
            skipped=tuple(pair for pair in checked if isinstance(pair, Skipped)),
            left_out=Counter(reason.value for reason in found if isinstance(reason, LeftOut)),
        )


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
