"""Which rows make up which micro-batch: a pure function of the run seed and a number.

A global micro-batch is what all ranks together see at once where a run starts. Number m of a data
set without buckets is positions [m * G, (m + 1) * G) of an endless sequence, in which epoch e is a
permutation sampled from (run seed, e); `diffalign.data.layout` says which part each rank takes. So
one process with a batch of 2n and two with n see the same global batches, and resuming needs the
number of samples alone.

With buckets, every bucket is such a sequence, and a schedule says which comes next: a cycle of N
micro-batches, N the number of pairs, gives each bucket as many as it has pairs, in an order
sampled from (run seed, cycle). Over a cycle every pair is seen G times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from diffalign.seeding import cpu_generator, derive_seed


@dataclass(frozen=True)
class Position:
    """One place in a micro-batch."""

    member: int
    """Index of the pair among all pairs."""
    bucket: int
    """The bucket it is in."""
    index: int
    """Its place in the endless sequence of that bucket."""
    visit: int
    """How often the pair has been visited before: its epoch."""


class Order:
    """The endless order of pairs of known number."""

    def __init__(self, run_seed: int, buckets: list[np.ndarray]) -> None:
        """Args:
        run_seed: of the run.
        buckets: for each bucket the indices of its pairs, int64 [n]; none is empty.
        """
        assert buckets and all(len(members) for members in buckets)
        self._run_seed = run_seed
        self._buckets = buckets
        self._permutation = lru_cache(maxsize=2 * len(buckets))(self._sample_permutation)
        self._schedule = lru_cache(maxsize=1)(self._sample_schedule)

    def micro_batch(self, number: int, size: int) -> list[Position]:
        """The pairs of one global micro-batch, all from one bucket.

        Args:
            number: of the global micro-batch, from 0.
            size: pairs in it, over all ranks.
        """
        bucket, earlier = self._bucket_of(number)
        return [self._at(bucket, earlier * size + i) for i in range(size)]

    def most_visits(self, micro_batches: int, size: int) -> int:
        """How often that pair is visited which is visited most, in so many micro-batches.

        Args:
            micro_batches: global ones, the first of all.
            size: pairs in each, over all ranks.
        """
        lengths = np.array([len(members) for members in self._buckets])
        if len(lengths) == 1:
            counts = np.array([micro_batches])
        else:
            cycles, rest = divmod(micro_batches, int(lengths.sum()))
            counts = cycles * lengths
            counts += np.bincount(self._schedule(cycles)[:rest], minlength=len(lengths))
        return int(np.ceil(counts * size / lengths).max())

    def replacement(self, position: Position, attempt: int) -> Position:
        """Another pair of the same bucket and epoch for one that cannot be used."""
        members = self._buckets[position.bucket]
        seed = derive_seed(self._run_seed, "replacement", position.bucket, position.index, attempt)
        return Position(
            int(members[seed % len(members)]), position.bucket, position.index, position.visit
        )

    def _at(self, bucket: int, position: int) -> Position:
        members = self._buckets[bucket]
        epoch, place = divmod(position, len(members))
        return Position(
            int(members[self._permutation(bucket, epoch)[place]]), bucket, position, epoch
        )

    def _bucket_of(self, number: int) -> tuple[int, int]:
        """The bucket of a global micro-batch, and how many it has had before."""
        if len(self._buckets) == 1:
            return 0, number
        cycle, place = divmod(number, sum(len(members) for members in self._buckets))
        schedule = self._schedule(cycle)
        bucket = int(schedule[place])
        before = int(np.count_nonzero(schedule[:place] == bucket))
        return bucket, cycle * len(self._buckets[bucket]) + before

    def _sample_schedule(self, cycle: int) -> np.ndarray:
        """The bucket of every micro-batch of a cycle."""
        buckets = np.repeat(
            np.arange(len(self._buckets)), [len(members) for members in self._buckets]
        )
        return buckets[self._sample_permutation(-1, cycle)]

    def _sample_permutation(self, bucket: int, epoch: int) -> np.ndarray:
        """Bucket -1 represents the schedule."""
        members = self._buckets[bucket : bucket + 1] if bucket >= 0 else self._buckets
        generator = cpu_generator(derive_seed(self._run_seed, "order", bucket, epoch))
        return torch.randperm(sum(len(m) for m in members), generator=generator).numpy()
