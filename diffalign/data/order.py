"""Which rows make up which micro-batch: a pure function of the run seed and a number.

A global micro-batch is what all ranks together see at once where a run starts. Number m of a data
set without buckets is positions [m * G, (m + 1) * G) of an endless sequence, in which epoch e is a
permutation sampled from (run seed, e); `diffalign.data.layout` says which part each rank takes. So
one process with a batch of 2n and two with n see the same global batches, and resuming needs the
number of samples alone.

With buckets, every bucket is such a sequence, and a schedule says which comes next: a cycle of N
micro-batches, N the number of pairs, gives each bucket as many as it has pairs, in an order
sampled from (run seed, cycle). Over a cycle every pair is seen G times.

With bands, the sequence of a bucket goes from band to band: the pairs of the first so many times as
it is said, each time permuted anew, then those of the second, and after the last the first again.
With buckets as well each of them does so by itself, and as the schedule gives each of them its
share, they are in about the same band.
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

    def __init__(
        self,
        run_seed: int,
        buckets: list[np.ndarray],
        *,
        bands: np.ndarray | None = None,
        passes: int = 1,
    ) -> None:
        """Args:
        run_seed: of the run.
        buckets: for each bucket the indices of its pairs, int64 [n]; none is empty.
        bands: which band each pair is in, int64, from 0; None is one for all.
        passes: how often the pairs of a band are seen before the next one comes.
        """
        assert buckets and all(len(members) for members in buckets)
        self._run_seed = run_seed
        self._buckets = buckets
        self._bands = [_bands_of(members, bands) for members in buckets]
        self._passes = passes
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
        return max(self._visits(bucket, int(count) * size) for bucket, count in enumerate(counts))

    def _visits(self, bucket: int, samples: int) -> int:
        """How often that pair of a bucket is visited which is visited most: one of its first band,
        as soon as a course through all bands has begun."""
        courses, rest = divmod(samples, self._passes * len(self._buckets[bucket]))
        first = len(self._bands[bucket][0])
        return courses * self._passes + min(self._passes, -(-rest // first))

    def replacement(self, position: Position, attempt: int) -> Position:
        """Another pair of the same bucket and epoch for one that cannot be used."""
        _, members, _ = self._place(position.bucket, position.index)
        seed = derive_seed(self._run_seed, "replacement", position.bucket, position.index, attempt)
        return Position(
            int(members[seed % len(members)]), position.bucket, position.index, position.visit
        )

    def _at(self, bucket: int, position: int) -> Position:
        visit, members, (band, place) = self._place(bucket, position)
        member = members[self._permutation(bucket, visit, band)[place]]
        return Position(int(member), bucket, position, visit)

    def _place(self, bucket: int, position: int) -> tuple[int, np.ndarray, tuple[int, int]]:
        """Earlier visits of the pair at a position, the pairs of its band, the number of the band
        and the place in this visit's permutation of it."""
        course, rest = divmod(position, self._passes * len(self._buckets[bucket]))
        bands = self._bands[bucket]
        starts = np.cumsum([0, *(self._passes * len(members) for members in bands)])
        band = int(np.searchsorted(starts, rest, side="right")) - 1
        members = bands[band]
        within, place = divmod(rest - int(starts[band]), len(members))
        return course * self._passes + within, members, (band, place)

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
        return buckets[self._permuted(len(buckets), -1, cycle)]

    def _sample_permutation(self, bucket: int, visit: int, band: int) -> np.ndarray:
        """Of the pairs of a band; where there is one band, they are those of a bucket."""
        parts = (bucket, visit, band) if len(self._bands[bucket]) > 1 else (bucket, visit)
        return self._permuted(len(self._bands[bucket][band]), *parts)

    def _permuted(self, count: int, *parts: int) -> np.ndarray:
        """A permutation of so many numbers; bucket -1 represents the schedule."""
        generator = cpu_generator(derive_seed(self._run_seed, "order", *parts))
        return torch.randperm(count, generator=generator).numpy()


def _bands_of(members: np.ndarray, bands: np.ndarray | None) -> list[np.ndarray]:
    """The pairs of a bucket by band, in order; bands of which it has none are left out."""
    if bands is None:
        return [members]
    found = bands[members]
    return [members[found == band] for band in np.unique(found)]
