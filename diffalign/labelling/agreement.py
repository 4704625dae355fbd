"""How far people agree, and how each of them answers: bias to a side, speed, and which model won.

Units of agreement are two sides of an item, whether they were shown alone or in a ranking; a skip
says nothing. Intervals of the agreement resample whole items.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diffalign.intervals import (
    Bootstrap,
    Interval,
    agreement_tally,
    exact_interval,
    krippendorff_alpha,
)
from diffalign.labelling.answers import VERDICTS, Answer, Verdict
from diffalign.labelling.items import Item
from diffalign.pages.parts import Section, Tile, notes, paragraph, table, tiles

_Unit = tuple[str, tuple[int, int]]
"""Item, and two of its sides."""
_Given = Mapping[_Unit, Mapping[str, Verdict]]
"""Unit -> person -> what they say."""


@dataclass(frozen=True, kw_only=True)
class PersonFigures:
    """How one person answers."""

    answers: int
    choices: Mapping[str, int]
    """How often each; those that never came are left out."""
    seconds: float | None
    """Median for which an item was seen."""
    left_share: float | None
    """Of the answers that are for one of two sides, those for the left one."""
    left_interval: Interval | None
    """Exact, of 95 %: chance is one half, since sides are shown at random."""
    with_others: float | None
    """Share of their verdicts that are those of most others on the same two sides, where others
    have a majority."""
    compared: int
    """Verdicts that the share is of."""

    @property
    def leans(self) -> str:
        """`left` or `right` where chance does not explain the share; empty elsewhere."""
        if self.left_interval is None or self.left_interval.low <= 0.5 <= self.left_interval.high:
            return ""
        return "left" if self.left_interval.low > 0.5 else "right"


@dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """Two models against each other, one vote an answer."""

    first: str
    second: str
    wins: int
    """Of the first."""
    ties: int
    """Those of which both are bad among them."""
    losses: int

    @property
    def interval(self) -> Interval | None:
        """Of the share of wins among decided votes; exact, of 95 %, as if votes were
        independent."""
        decided = self.wins + self.losses
        return exact_interval(self.wins, decided) if decided else None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """All figures of some labels."""

    people: Mapping[str, PersonFigures]
    verdicts: Mapping[str, int]
    """How often each is said of two sides."""
    compared: int
    """Units that two people or more speak of."""
    alpha: float | None
    """Krippendorff's, of nominal verdicts: 1 where all agree, 0 at chance; None where nothing can
    be said."""
    alpha_interval: Interval | None
    models: Sequence[ModelFigures]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def agreement(items: Sequence[Item], answers: Iterable[Answer]) -> Agreement:
    """The figures of answers to some items."""
    answers = list(answers)
    given: dict[_Unit, dict[str, Verdict]] = defaultdict(dict)
    for answer in answers:
        for sides, verdict in answer.verdicts():
            given[answer.item, sides][answer.person] = verdict
    alpha, interval, compared = _alpha(given)
    by_person: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_person[answer.person].append(answer)
    return Agreement(
        people={name: _figures(name, own, given) for name, own in sorted(by_person.items())},
        verdicts=dict(Counter(v for said in given.values() for v in said.values())),
        compared=compared,
        alpha=alpha,
        alpha_interval=interval,
        models=_models(items, given),
    )


def _alpha(given: _Given) -> tuple[float | None, Interval | None, int]:
    """Krippendorff's alpha, its interval, and of how many units it is."""
    compared = [unit for unit, said in given.items() if len(said) > 1]
    if not compared:
        return None, None, 0
    counts = np.array(
        [[list(given[unit].values()).count(v) for v in VERDICTS] for unit in compared], dtype=float
    )
    numbers: dict[str, int] = {}
    of_item = [numbers.setdefault(item, len(numbers)) for item, _ in compared]
    tally = {
        name: np.bincount(of_item, column).astype(float)
        for name, column in agreement_tally(counts).items()
    }
    alpha = float(krippendorff_alpha({n: np.asarray(column.sum()) for n, column in tally.items()}))
    if np.isnan(alpha):
        return None, None, len(compared)
    found = Bootstrap(resamples=2000).intervals(tally, {"alpha": krippendorff_alpha})
    return alpha, found["alpha"], len(compared)


def _figures(name: str, own: Sequence[Answer], given: _Given) -> PersonFigures:
    choices = Counter(answer.answer for answer in own)
    left, right = choices["left"], choices["right"]
    times = [answer.seconds for answer in own if answer.seconds is not None]
    alike = [
        said[name] == most
        for said in given.values()
        if name in said and (most := _most(v for who, v in said.items() if who != name))
    ]
    return PersonFigures(
        answers=len(own),
        choices={str(choice): count for choice, count in choices.items()},
        seconds=statistics.median(times) if times else None,
        left_share=left / (left + right) if left + right else None,
        left_interval=exact_interval(left, left + right) if left + right else None,
        with_others=statistics.fmean(alike) if alike else None,
        compared=len(alike),
    )


def _most(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The one that was said most often; None where there is none, or several are."""
    ranked = Counter(verdicts).most_common(2)
    if not ranked or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def _models(items: Sequence[Item], given: _Given) -> list[ModelFigures]:
    models = {item.item_id: item.models for item in items if item.models}
    found: dict[tuple[str, str], Counter[str]] = {}
    for (item, (i, j)), said in given.items():
        if item in models and (one := models[item][i]) != (other := models[item][j]):
            turned = (other, one) in found
            counts = found.setdefault((other, one) if turned else (one, other), Counter())
            for verdict in said.values():
                if verdict in ("first", "second"):
                    counts["wins" if (verdict == "first") != turned else "losses"] += 1
                else:
                    counts["ties"] += 1
    return [
        ModelFigures(
            first=one,
            second=other,
            wins=counts["wins"],
            ties=counts["ties"],
            losses=counts["losses"],
        )
        for (one, other), counts in found.items()
    ]


# --- for people ---------------------------------------------------------------------------------


def sentences(found: Agreement) -> list[str]:
    """What should be read first, one line each."""
    answers = sum(person.answers for person in found.people.values())
    lines = [f"{answers:,} answers of {len(found.people)} people"]
    if found.alpha is not None:
        lines.append(
            f"Krippendorff's alpha {found.alpha:.2f}{_of(found.alpha_interval)}, over "
            f"{found.compared:,} comparisons that several people made"
        )
    for name, person in found.people.items():
        if person.leans and person.left_share is not None:
            lines.append(
                f"{name} chooses the left side in {person.left_share:.0%} of "
                f"{person.choices.get('left', 0) + person.choices.get('right', 0)} answers"
                f"{_of(person.left_interval, percent=True)}: sides are shown at random, so this is "
                f"the side and not what it shows"
            )
    return lines


def of_models(found: Agreement) -> list[str]:
    """Which model won against which, one line each; names them, so not for those who label."""
    return [
        f"{each.first} against {each.second}: {each.wins} won, {each.ties} tied, {each.losses} lost"
        + (f"; {share:.0%} of decided votes{_of(each.interval, percent=True)}" if decided else "")
        for each in found.models
        for decided in [each.wins + each.losses]
        for share in [each.wins / max(1, decided)]
    ]


def sections(found: Agreement) -> list[Section]:
    """The page: how far people agree, and how each of them answers. No model is named, nor how
    often the first side of the data won, which may be one."""
    alpha = "none yet" if found.alpha is None else f"{found.alpha:.2f}"
    answers = sum(person.answers for person in found.people.values())
    undecided = {name: found.verdicts.get(name, 0) for name in ("tie", "both_bad")}
    head = [
        Tile("Krippendorff's alpha", alpha, _of(found.alpha_interval, bare=True)),
        Tile("Comparisons by several people", f"{found.compared:,}"),
        Tile("Answers", f"{answers:,}", ", ".join(f"{n} {k}" for k, n in _said(undecided))),
    ]
    rows = [
        (
            name,
            f"{person.answers:,}",
            ", ".join(f"{count} {choice}" for choice, count in _said(person.choices)),
            "" if person.seconds is None else f"{person.seconds:.1f} s",
            ""
            if person.left_share is None
            else f"{person.left_share:.0%}{_of(person.left_interval, percent=True)}",
            "" if person.with_others is None else f"{person.with_others:.0%} of {person.compared}",
        )
        for name, person in found.people.items()
    ]
    warned = [
        f"{name} leans to the {person.leans}."
        for name, person in found.people.items()
        if person.leans
    ]
    columns = ("Person", "Answers", "Of these", "Median time", "Left of decided", "As most others")
    return [
        Section(
            "Agreement",
            tiles(head),
            paragraph(
                "Alpha is 1 where all agree and 0 where they agree as often as by chance; it is of "
                "what is said of two sides: the one, the other, a tie, or both bad. Intervals are "
                "of 95 %."
            ),
        ),
        Section("People", notes(warned), table(columns, rows)),
    ]


def _said(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(name.replace("_", " "), count) for name, count in sorted(counts.items())]


def _of(interval: Interval | None, *, percent: bool = False, bare: bool = False) -> str:
    if interval is None:
        return ""
    form = ".0%" if percent else ".2f"
    text = f"{interval.low:{form}} to {interval.high:{form}}"
    return text if bare else f" ({text})"
