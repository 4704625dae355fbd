"""The section `strength` of a data set, and the one place where a row's numbers become a pair's
strength."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from diffalign import components
from diffalign.data.strength.base import LABELS, SCORES, AbstractPreference, Numbers, Strength
from diffalign.data.strength.certain import Certain
from diffalign.data.strength.gap import sigmoid
from diffalign.errors import ConfigError, DataError, did_you_mean
from diffalign.parsing import shortly
from diffalign.ranges import Ranged


class ReadsStrength(Protocol):
    """What is asked of an objective."""

    @property
    def takes_strength(self) -> Collection[str]:
        """The parts of a pair's strength that it reads."""

    @property
    def needs_strength(self) -> Collection[str]:
        """Those without which it has no loss."""


@dataclass(frozen=True, kw_only=True)
class StrengthConfig(Ranged):
    """What is known of a pair besides its order, and from which numbers of its row."""

    preference: AbstractPreference = field(default_factory=Certain)
    """Probability that the side that won is the better one. Objectives of pairs read it as the
    mean of their loss over both orders: the soft cross-entropy, for DPO."""
    columns: dict[str, str] = field(default_factory=dict)
    """Numbers of the two sides besides those by which the data set says who won: a name of your
    own -> two columns with a comma between, of the first and the second side (of the chosen and
    the rejected one), or one column of lists. Rows without them have no label."""
    margin: dict[str, float] = field(default_factory=dict)
    """Names of numbers -> what their gap (chosen less rejected) is multiplied by; the sum is what
    the reward of the chosen side should exceed that of the rejected one by. MODPO
    (arXiv:2310.03708) with weights w divides by its first: beta / w1 and w_k / w1 here."""
    target: dict[str, float] = field(default_factory=dict)
    """The same sum as the value that the difference of rewards should have, for
    `margin_regression`."""
    calibrated: bool = False
    """Whether the target is of calibrated numbers: in place of each its win rate against the other
    images of its row, the mean of sigmoid(own - other) (CaPO, arXiv:2502.02588)."""
    weight: Literal["alike", "certainty"] = "alike"
    """How much a pair's loss counts: all alike, or by one over the standard deviation of what is
    known of the preference, of votes in units of their prior's, of a gap in units of its
    temperature."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight == "certainty" and not self.preference.knows_certainty:
            raise ValueError(
                f"weight is certainty, and preference {components.kind_of(self.preference)} does "
                f"not know its own: take votes with a prior above 0, or gap with deviations"
            )
        if self.calibrated and not self.target:
            raise ValueError("calibrated is true, and there is no target to calibrate: name one")
        if LABELS in self.columns:
            raise ValueError(
                f"columns.{LABELS} is the name of the numbers by which the data set says who won: "
                f"call these otherwise"
            )
        for key, names in self.read_by().items():
            for name in names:
                if name not in (LABELS, *self.columns) and not name.startswith(SCORES):
                    known = [LABELS, *self.columns]
                    raise ValueError(
                        f"{key} reads {name}, and there are {', '.join(known)}: give its two "
                        f"columns under columns.{did_you_mean(name, known)}"
                    )
        unread = [name for name in self.columns if name not in self.reads]
        if unread:
            raise ValueError(
                f"columns.{unread[0]} is read by nothing: name it under preference.of, margin or "
                f"target, or leave it out"
            )
        for name, given in self.columns.items():
            if not self.columns_of(name):
                raise ValueError(f"columns.{name} names no column, got {shortly(given)}")

    @property
    def is_default(self) -> bool:
        """Whether nothing is asked of the data."""
        return not self.asked

    @property
    def asked(self) -> dict[str, str]:
        """The parts that pairs have, and the setting that asks for each, as `key is value`."""
        found = {}
        if not self.preference.is_certain:
            found["preference"] = f"strength.preference is {components.kind_of(self.preference)}"
        for part in ("margin", "target"):
            if names := getattr(self, part):
                found[part] = f"strength.{part} is of {', '.join(names)}"
        if self.weight != "alike":
            found["weight"] = f"strength.weight is {self.weight}"
        return found

    def read_by(self) -> dict[str, Sequence[str]]:
        """Setting -> names of the numbers that it reads."""
        return {
            "preference": self.preference.reads,
            "margin": tuple(self.margin),
            "target": tuple(self.target),
        }

    @property
    def reads(self) -> frozenset[str]:
        """Names of all numbers that are read."""
        return frozenset(name for names in self.read_by().values() for name in names)

    def columns_of(self, name: str) -> tuple[str, ...]:
        """The columns of a name."""
        return tuple(filter(None, map(str.strip, self.columns[name].split(","))))

    def is_share(self, name: str) -> bool:
        """Whether a name has one column, of a probability of the first side."""
        return self.preference.own_share and name in self.preference.reads

    def check(self, section: str, *, names: Collection[str], labels: str | None) -> None:
        """Refuse what a data set cannot give.

        Args:
            section: `data` or `responses`.
            names: of its columns.
            labels: why there are no numbers by which it says who won; None where there are.

        Raises:
            DataError: numbers are read that it does not have.
        """
        for key, read in self.read_by().items():
            if LABELS in read and labels is not None:
                raise DataError(
                    f"{section}.strength.{key} reads the labels of the two sides, and {labels}. "
                    f"Name two columns of numbers under {section}.strength.columns, or leave "
                    f"strength.{key} out"
                )
            for name in read:
                if name.startswith(SCORES) and section != "data":
                    raise DataError(
                        f"{section}.strength.{key} reads {name}, and files of scores are of images "
                        f"(data.scores): name two columns of numbers under "
                        f"{section}.strength.columns"
                    )
        for name in self.columns:
            for column in self.columns_of(name):
                if column not in names:
                    raise DataError(
                        f"{section}.strength.columns.{name} names {column}, and the data set has "
                        f"{', '.join(sorted(names))}.{did_you_mean(column, list(names))}"
                    )

    def of(
        self,
        numbers: Numbers,
        *,
        keeps_ties: bool = False,
        tie: bool = False,
        importance: float | None = None,
    ) -> Strength:
        """A pair's strength.

        Args:
            numbers: those that `reads` says.
            keeps_ties: whether pairs of which neither side won are kept.
            tie: whether this is one.
            importance: how much the pair counts for other reasons; None for 1, where all do.

        Raises:
            UnusableRowError: a number has no meaning where it is read.
        """
        preference = None
        if not self.preference.is_certain:
            preference = self.preference.probability(numbers)
        elif keeps_ties:
            preference = 0.5 if tie else 1.0
        weight = importance
        if self.weight == "certainty":
            weight = (1.0 if importance is None else importance) * self.preference.certainty(
                numbers
            )
        return Strength(
            preference=preference,
            margin=_gap(numbers, self.margin),
            target=_gap(numbers, self.target, calibrated=self.calibrated),
            weight=weight,
        )

    def describe(self) -> str:
        """What is made of a pair's numbers, as the end of a sentence; may be empty."""
        said = [self.preference.describe()]
        said += [
            f"its {part} is {_in_words(getattr(self, part))}"
            for part in ("margin", "target")
            if getattr(self, part)
        ]
        if self.weight != "alike":
            said.append("it counts by its certainty")
        return "; ".join(filter(None, said))


def calibrated(scores: Sequence[float]) -> list[float]:
    """The win rate of each of N scores against the others, mean of sigmoid(own - other) [N].

    Source: CaPO, arXiv:2502.02588; they add up to N / 2.
    """
    others = len(scores) - 1
    return [
        sum(sigmoid(own - scores[j]) for j in range(len(scores)) if j != i) / others
        for i, own in enumerate(scores)
    ]


def win_rates_of(name: str) -> str:
    """The name of the calibrated numbers of a name, where a row has more than two."""
    return f"{name}, calibrated"


def _gap(
    numbers: Numbers, factors: Mapping[str, float], *, calibrated: bool = False
) -> float | None:
    if not factors:
        return None
    total = 0.0
    for name, factor in factors.items():
        chosen, rejected = numbers[name]
        if calibrated:
            chosen, rejected = numbers.get(win_rates_of(name)) or _of_two(chosen, rejected)
        total += factor * (chosen - rejected)
    return total


def _of_two(chosen: float, rejected: float) -> tuple[float, float]:
    first, second = calibrated([chosen, rejected])
    return first, second


def _in_words(factors: Mapping[str, float]) -> str:
    return " + ".join(f"{factor:g} * gap of {name}" for name, factor in factors.items())


def refuse_unread(
    section: str, asked: Mapping[str, str], objective: ReadsStrength, *, alternative: str
) -> None:
    """Refuse an objective that does not read what pairs say of themselves, or needs what they do
    not say.

    Args:
        section: of the config, such as `data`.
        asked: part -> the setting that gives it.
        objective: of the run.
        alternative: what the settings are otherwise, as the end of a sentence.

    Raises:
        ConfigError: naming setting and objective.
    """
    kind = components.kind_of(objective)
    reads = sorted(objective.takes_strength)
    for part, setting in asked.items():
        if part not in reads:
            able = f"it reads {' and '.join(reads)} alone" if reads else _UNABLE
            raise ConfigError(
                f"{section}.{setting}, and the objective {kind} does not read the {part} of a "
                f"pair: {able}. {alternative}"
            )
    for part in sorted(objective.needs_strength):
        if part == "advantage" and part not in asked:
            raise ConfigError(
                f"the objective {kind} learns from responses that the policy sampled, each with "
                f"its advantage over the others of its prompt, and {section} gives none: take "
                f"rollouts that sample groups of responses"
            )
        if part not in asked:
            rounds = ", or let rounds of responses give it: rollouts.targets=true"
            raise ConfigError(
                f"the objective {kind} needs a {part} of each pair, and {section} gives none: take "
                f"data with scores, and set its strength.{part} to the numbers that it is made of, "
                f"such as {{labels: 1.0}}{rounds if part == 'target' else ''}"
            )


_UNABLE = "it takes every pair as decided and alike"
