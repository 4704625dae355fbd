"""Scored responses of a round, and the rows that are trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ScoredResponses:
    """The responses to one question of a round: a line of `responses.jsonl`."""

    visit: int
    """Number of the question's visit in the round."""
    question_id: str
    question: str
    """The user's last turn."""
    texts: tuple[str, ...]
    """k of them; none where they were not sampled."""
    rewards: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    """By reward, of each response; None where it has none."""
    watched: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    """The same by rewards that nothing is trained on."""
    tokens: tuple[int, ...] = ()
    """How many each response has, the one that ends it included."""
    unfinished: int = 0
    """How many did not end by themselves."""
    unusable: str | None = None
    """Why nothing was sampled or scored; None if it was."""

    def vector(self, names: Sequence[str]) -> list[list[float]]:
        """Rewards of some names, [R][k], NaN where there is none."""
        return [
            [math.nan if value is None else value for value in self.rewards[name]] for name in names
        ]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one sample of a batch is made of."""

    sample_id: str
    visit: int
    responses: Mapping[str, int | None]
    """View -> the place of a sampled response; None for that of the data set of this name."""
    advantage: float | None = None
    preference: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a round trains on, and what to say of it."""

    rows: Sequence[Row]
    figures: Mapping[str, float] = field(default_factory=dict)
    """For the log."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Questions that give no row, by reason."""
    sentence: str = ""
    """The figures in words."""
