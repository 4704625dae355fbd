"""A gap of scores: the larger, the surer, as a Bradley-Terry model of the scorer has it.

Source: Wang et al. 2024, arXiv:2401.06080 (Secrets of RLHF II), who call the mean gap of several
scorers the strength of a preference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from diffalign.data.strength.base import LABELS, AbstractPreference, Numbers, malformed
from diffalign.ranges import MoreThan


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), whatever the size of x."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


@dataclass(frozen=True, kw_only=True)
class Gap(AbstractPreference):
    """sigmoid of the difference of two scores over a temperature."""

    temperature: Annotated[float, MoreThan(0)]
    """The difference of scores at which the odds are e to 1, 2.7 to 1. A reward model that was
    trained as Bradley-Terry (PickScore, ImageReward, HPS) says 1 in the units of its logits."""
    of: str = LABELS
    """Which numbers are the scores: `labels`, or a name under `columns`."""
    deviations: str | None = None
    """Name under `columns` of the standard deviation of either side's score, such as `score` writes
    with `repeats`: for `weight: certainty`."""

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.of, *filter(None, [self.deviations]))

    @property
    def knows_certainty(self) -> bool:
        return self.deviations is not None

    def probability(self, numbers: Numbers) -> float:
        chosen, rejected = numbers[self.of]
        return sigmoid((chosen - rejected) / self.temperature)

    def certainty(self, numbers: Numbers) -> float:
        """In units of the temperature: 1 where the gap is known to so much."""
        assert self.deviations is not None, "knows_certainty was asked"
        chosen, rejected = numbers[self.deviations]
        deviation = math.hypot(chosen, rejected)
        if min(chosen, rejected) < 0 or not deviation > 0:
            raise malformed(
                f"{self.deviations} are standard deviations, and are {chosen:g} and "
                f"{rejected:g}: they must be at least 0, and not both 0"
            )
        return self.temperature / deviation

    def describe(self) -> str:
        return f"its probability is sigmoid(gap / {self.temperature:g}) of {self.of}"
