"""How sure a pair is, by how much, and how much it counts: what data says besides which side won.

A row has numbers of its two sides: votes, scores of a reward model, standard deviations of those.
Which numbers become which part of a pair's strength is the section `strength` of its data.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffalign.data.skipping import SkipReason, UnusableRowError
from diffalign.parsing import shortly
from diffalign.ranges import Ranged

LABELS = "labels"
"""Name of the numbers by which a data set says which side won."""

SCORES = "scores."
"""What names of numbers begin with that come from files of scores (`data.scores`)."""

Numbers = Mapping[str, tuple[float, float]]
"""Name -> the number of the chosen side, and that of the rejected one; higher is better."""


@dataclass(frozen=True, kw_only=True)
class Strength:
    """What is known of a pair besides its order; None is what nobody asked for."""

    preference: float | None = None
    """Probability that the chosen side is the preferred one; one half for a tie that is kept."""
    margin: float | None = None
    """How much the reward of the chosen side should exceed that of the rejected one."""
    target: float | None = None
    """What the difference of the two rewards should be, for a loss that regresses it."""
    weight: float | None = None
    """How much the pair counts, relative to others."""
    advantage: float | None = None
    """How much better the response is than others to its question, where rows are single
    responses; may be negative."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not math.isfinite(value):
                raise malformed(f"its {field.name} is {value}, and must be a finite number")
        if self.preference is not None and not 0 <= self.preference <= 1:
            raise malformed(
                f"its preference is {self.preference:g}, and a probability lies between 0 and 1"
            )
        if self.weight is not None and self.weight < 0:
            raise malformed(f"its weight is {self.weight:g}, and must be at least 0")

    def parts(self) -> dict[str, float]:
        """Those that somebody asked for, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


NOTHING_ASKED = Strength()
"""Of a pair whose label is all that is read."""


def stack_strengths(strengths: Sequence[Strength]) -> dict[str, Tensor]:
    """Those of a batch, as fields of `Likelihoods`: name -> float32 [B].

    Args:
        strengths: of the pairs of one data set, which all have the same parts.
    """
    parts = [strength.parts() for strength in strengths]
    return {name: torch.tensor([each[name] for each in parts]) for name in parts[0]}


@dataclass(frozen=True, kw_only=True)
class AbstractPreference(Ranged, abc.ABC):
    """Where the probability that the chosen side is preferred comes from; its module is its
    `kind`."""

    is_certain: ClassVar[bool] = False
    """Whether every pair that is no tie is certain."""
    own_share: ClassVar[bool] = False
    """Whether one column is enough, which holds the share of the first side."""
    counts: ClassVar[bool] = False
    """Whether its numbers are counts, of which the larger one wins."""

    @property
    @abc.abstractmethod
    def reads(self) -> tuple[str, ...]:
        """Names of the numbers that it reads."""

    @abc.abstractmethod
    def probability(self, numbers: Numbers) -> float:
        """That the chosen side is the preferred one.

        Raises:
            UnusableRowError: the numbers are none that it can read.
        """

    def certainty(self, numbers: Numbers) -> float:
        """One over the standard deviation of what is known, in a unit of its own; greater than 0.

        Raises:
            UnusableRowError: nothing is known of it.
        """
        raise NotImplementedError

    @property
    def knows_certainty(self) -> bool:
        """Whether `certainty` says something."""
        return False

    @abc.abstractmethod
    def describe(self) -> str:
        """The rule as half a sentence."""


def number_pair(values: Mapping[str, Any], columns: Sequence[str]) -> tuple[float, float]:
    """Numbers of the two sides of a row.

    Args:
        values: of the row, by column; none of them is null.
        columns: of both sides; or one, of lists of two numbers, or of shares of the first side.

    Raises:
        UnusableRowError: there are other things.
    """
    found: list[Any] = [values[column] for column in columns]
    if len(columns) == 1 and isinstance(found[0], (list, tuple, np.ndarray)):
        found = list(found[0])
        if len(found) != 2:
            raise malformed(f"{columns[0]} is {shortly(found)}, expected a number for each side")
    numbers = []
    for value in found:
        try:
            numbers.append(float(value))
        except (TypeError, ValueError, OverflowError):
            raise malformed(
                f"{' and '.join(columns)} hold {shortly(value)}, expected numbers"
            ) from None
    if any(map(math.isnan, numbers)):
        raise malformed(f"{' and '.join(columns)} hold {shortly(found)}, expected numbers")
    first, second = numbers if len(numbers) == 2 else (numbers[0], 1 - numbers[0])
    return first, second


def malformed(detail: str) -> UnusableRowError:
    """The error for a row whose numbers mean nothing."""
    return UnusableRowError(SkipReason.MALFORMED, detail)
