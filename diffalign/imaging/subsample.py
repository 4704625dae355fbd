"""A few of many, evenly spaced: what grids and preview strip strips have room for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, spread over all of them, the first included."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def evenly_spaced_with_ends(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, at least 2, from the first one to the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
