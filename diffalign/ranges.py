"""Numbers that a setting may have, written next to its type.

    steps: Annotated[int, AtLeast(1)] = 50
    beta: Annotated[float, MoreThan(0, "at 0 nothing is learnt")]
    eta: Annotated[float, Between(0, 1)] = 0.0

The config loader names file and key of a number outside; a dataclass that is `Ranged` refuses it in
code too.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union


@dataclass(frozen=True)
class Range:
    """An interval of numbers; `AtLeast`, `MoreThan`, `AtMost` and `Between` make one."""

    low: float = -math.inf
    high: float = math.inf
    without: tuple[float, ...] = ()
    """Ends that do not belong to it."""
    reason: str = ""
    """What is wrong outside, as the end of the sentence that refuses."""

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and value not in self.without

    @property
    def allowed(self) -> str:
        """The interval in words, such as `at least 1`."""
        if math.inf not in (self.high, -self.low) and not self.without:
            return f"between {self.low:g} and {self.high:g}"
        above = "above" if self.high < math.inf else "greater than"
        low = f"{above if self.low in self.without else 'at least'} {self.low:g}"
        high = f"{'below' if self.high in self.without else 'at most'} {self.high:g}"
        ends = [low] * (self.low > -math.inf) + [high] * (self.high < math.inf)
        return " and ".join(ends)

    def refusal(self, name: str, value: float) -> str:
        """The sentence about a value outside.

        Args:
            name: of the setting.
            value: what it was given.
        """
        sentence = f"{name} must be {self.allowed}, got {value}"
        return f"{sentence}: {self.reason}" if self.reason else sentence


def AtLeast(low: float, reason: str = "") -> Range:
    """From `low` on, itself included."""
    return Range(low=low, reason=reason)


def MoreThan(low: float, reason: str = "") -> Range:
    """From `low` on, itself excluded."""
    return Range(low=low, without=(low,), reason=reason)


def Between(low: float, high: float, reason: str = "", *, without: Sequence[float] = ()) -> Range:
    """From `low` to `high`, both included but for those listed in `without`."""
    return Range(low=low, high=high, without=tuple(without), reason=reason)


class Ranged:
    """A dataclass whose annotated ranges hold from the moment it is made.

    Whoever has a `__post_init__` of its own begins it with `super().__post_init__()`.
    """

    def __post_init__(self) -> None:
        for name, hint in _annotated(type(self)):  # type: ignore[arg-type]
            refuse_outside(hint, getattr(self, name), name)


@functools.cache
def _annotated(cls: Any) -> tuple[tuple[str, Any], ...]:
    """The fields that have a range somewhere in their types."""
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]
    return tuple((name, hints[name]) for name in names if any(ranges_in(hints[name])))


def ranges_in(hint: Any) -> Iterator[Range]:
    """All ranges in a type, at any depth."""
    if typing.get_origin(hint) is Annotated:
        yield from (extra for extra in hint.__metadata__ if isinstance(extra, Range))
    for argument in typing.get_args(hint):
        yield from ranges_in(argument)


def refuse_outside(hint: Any, value: Any, name: str) -> None:
    """Raise ValueError, naming what was given and what is allowed, for a number outside its range.

    Args:
        hint: the type of a setting; ranges may stand within its unions, tuples and mappings.
        value: of that type.
        name: of the setting.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        for allowed in hint.__metadata__:
            bounded = isinstance(allowed, Range) and isinstance(value, (int, float))
            if bounded and value not in allowed:
                raise ValueError(allowed.refusal(name, value))
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            refuse_outside(argument, value, name)
    elif origin is tuple and isinstance(value, (tuple, list)):
        of_items = arguments[:1] * len(value) if Ellipsis in arguments else arguments
        for i, (of_item, item) in enumerate(zip(of_items, value, strict=False)):
            refuse_outside(of_item, item, f"{name}[{i}]")
    elif origin in (dict, collections.abc.Mapping) and isinstance(value, Mapping):
        for key, item in value.items():
            refuse_outside(arguments[1], item, f"{name}.{key}")
