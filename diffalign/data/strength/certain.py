"""Certain labels: the side that won is the better one, and a tie that is kept is half of either."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.data.strength.base import AbstractPreference, Numbers


@dataclass(frozen=True, kw_only=True)
class Certain(AbstractPreference):
    """The labels as they are, whatever their numbers: 3 votes to 1 are as good as 30 to 0."""

    is_certain: ClassVar[bool] = True

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    def probability(self, numbers: Numbers) -> float:
        return 1.0

    def describe(self) -> str:
        return ""
