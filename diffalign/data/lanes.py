"""How a stream is cut into lanes, and which sample of a run is of which lane: arithmetic alone.

The endless sequence of samples goes from lane to lane, `turn` samples from each.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from diffalign import world
from diffalign.data.layout import Layout

_MOST_LANES = 32
_MOST_UNEQUAL = 1.1
"""Length of the longest lane at most, in multiples of the shortest, whose pairs are seen as much
more often."""
_MOST_HELD = 1 << 29
"""Bytes that all parts which one process reads may take: each has one part for sure."""


def cut_into_lanes(layout: Layout, parts: Sequence[int], *, held_bytes: int = 0) -> tuple[int, int]:
    """The number of lanes, and of samples that are taken from one before the next has its turn.

    Unless parts take much memory, nothing in it depends on how the global micro-batch was shared
    among the processes with which the run starts.

    Args:
        layout: of the run that starts.
        parts: how large each of the stream is.
        held_bytes: memory that a part takes while it is being read.
    """
    micro_batch = layout.micro_batch
    affordable = world.size() * max(1, _MOST_HELD // max(1, held_bytes))
    most, few = min(len(parts), _MOST_LANES, affordable), affordable < _MOST_LANES
    fitting = [
        n
        for n in range(1, most + 1)
        if (micro_batch % n == 0 or (n % micro_batch == 0 and layout.samples_per_step % n == 0))
        and _longest(parts, n) <= _MOST_UNEQUAL
    ]

    def suits(n: int) -> tuple[bool, int, int]:
        """These processes where lanes are few; else as many numbers of processes as can be."""
        divisors = sum(n % d == 0 for d in range(1, n + 1))
        return few and n % world.size() == 0, divisors, n

    lanes = max(fitting, key=suits, default=1)
    return lanes, max(1, micro_batch // lanes)


def _longest(parts: Sequence[int], lanes: int) -> float:
    """The longest of so many lanes, in multiples of the shortest."""
    lengths = [sum(parts[part] for part in lane) for lane in deal(parts, lanes)]
    return max(lengths) / max(1, min(lengths))


def deal(parts: Sequence[int], lanes: int) -> list[list[int]]:
    """The numbers of the parts of each lane, in order: each part goes to the lane with the least.

    Args:
        parts: how large each is.
        lanes: no more than there are parts.
    """
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    loads = [(0, lane) for lane in range(lanes)]
    for part, size in enumerate(parts):
        load, lane = loads[0]
        dealt[lane].append(part)
        heapq.heapreplace(loads, (load + size, lane))
    return dealt


def lane_of(sample: int, lanes: int, turn: int) -> tuple[int, tuple[int, int]]:
    """How often each lane has had its turn before a sample; its lane, and its place in the turn."""
    rounds, rest = divmod(sample, lanes * turn)
    return rounds, divmod(rest, turn)


def taken_from(samples: int, lane: int, lanes: int, turn: int) -> int:
    """How many of the first so many samples are of a lane."""
    rounds, rest = divmod(samples, lanes * turn)
    return rounds * turn + min(max(rest - lane * turn, 0), turn)
