"""Probabilities that the data itself says, such as the share of a judge's verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.data.strength.base import AbstractPreference, Numbers


@dataclass(frozen=True, kw_only=True)
class Given(AbstractPreference):
    """A column of probabilities that the first side is the preferred one."""

    own_share: ClassVar[bool] = True

    of: str
    """Name under `columns` of one column, of the first side (of two images, or the chosen one)."""

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.of,)

    def probability(self, numbers: Numbers) -> float:
        return numbers[self.of][0]

    def describe(self) -> str:
        return f"its probability is {self.of}"
