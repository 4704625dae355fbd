"""What each rank decodes next: from an index of known pairs, or from a stream."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffalign import world
from diffalign.data.pairs.records import ImagePair, LeftOut, Skipped
from diffalign.data.pairs.transforms import Size


@dataclass(frozen=True)
class Work:
    """One visit of a pair, for a worker to decode."""

    pair: int | ImagePair
    """Number of its row, or the pair itself."""
    visit: int
    """Number of earlier visits."""
    target: Size | None
    """(height, width) to cut to; None where images keep their size."""


@dataclass(frozen=True)
class PlannedBatch:
    """This rank's part of one global micro-batch."""

    works: list[Work]
    """`pairs_per_device` of them."""
    replacement: Callable[[int, int], Work]
    """(index in `works`, attempt) -> another pair for one that cannot be used."""
    after: dict[str, Any]
    """Position of the plan behind this micro-batch; the same on every rank."""
    out_of: int
    """Pairs that the share of unusable ones is taken of."""
    skipped: tuple[Skipped, ...] = ()
    """Pairs that were found unusable on the way to this micro-batch, before decoding."""


class AbstractPlan(abc.ABC):
    """An endless sequence of micro-batches."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Counts as a sentence."""

    @abc.abstractmethod
    def start(self) -> dict[str, Any]:
        """The position before the first micro-batch, of plain JSON values."""

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

    @abc.abstractmethod
    def batches(self, position: Mapping[str, Any], pairs_per_device: int) -> Iterator[PlannedBatch]:
        """Micro-batches of this rank from a position on."""


def rank_part(pairs_per_device: int) -> slice:
    """Which places of a global micro-batch are this rank's."""
    first = world.rank() * pairs_per_device
    return slice(first, first + pairs_per_device)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the rows of a data set are."""

    rows: int
    pairs: int
    """Rows with a preference, the unusable ones included."""
    left_out: Mapping[LeftOut, int]
    noun: str = "rows"
    """What `rows` counts."""

    def describe(self) -> str:
        """For example `1,200 rows: 1,000 pairs, 150 left out as tie, 50 left out as no label`."""
        left_out = [
            f"{self.left_out.get(reason, 0):,} left out ({reason.value})"
            for reason in LeftOut
            if self.left_out.get(reason, 0)
        ]
        return f"{self.rows:,} {self.noun}: " + ", ".join([f"{self.pairs:,} pairs", *left_out])
