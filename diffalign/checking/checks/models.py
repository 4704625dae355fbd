"""How often the images of each generating model are preferred."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from diffalign.checking.checks.base import AbstractCheck, Finding, Outcome, Share
from diffalign.checking.rows import CheckedRow, Examined
from diffalign.ranges import AtLeast, Between

_NAME = re.compile(r"model|generator", re.I)
_OF_SIDE = re.compile(r"(^|[^a-z])(chosen|rejected)([^a-z]|$)", re.I)
_OF_PLACE = re.compile(r"(?P<stem>.*?)(?P<place>\d+|(?<![a-z])[ab])(?P<end>(_[a-z_]+)?)", re.I)


@dataclass(frozen=True, kw_only=True)
class Models(AbstractCheck):
    """Wins of each model over the others, where two columns say which model made which side, such
    as `model_0` and `model_1`, or `chosen_model` and `rejected_model`."""

    title: ClassVar[str] = "Generating models"

    most: Annotated[float, Between(0.5, 1)] = 0.9
    """A model is a finding where its whole interval is above this share, or below one minus it."""
    at_least: Annotated[int, AtLeast(1)] = 30
    """Comparisons with other models below which a model is not listed."""

    @classmethod
    def reads(cls, column: str) -> bool:
        return _NAME.search(column) is not None

    def look(self, data: Examined) -> Outcome:
        columns = _columns({name for _, row in data.pairs for name in row.values})
        if columns is None:
            return Outcome(passed_over="no two columns say which model made which side")
        wins: Counter[str] = Counter()
        losses: Counter[str] = Counter()
        same = 0
        for _, row in data.pairs:
            found = _models_of(row, columns)
            if found is None:
                continue
            chosen, rejected = found
            if chosen == rejected:
                same += 1
            else:
                wins[chosen] += 1
                losses[rejected] += 1
        shares = {
            model: Share.of_trials(wins[model], wins[model] + losses[model], data.confidence)
            for model in sorted({*wins, *losses}, key=lambda m: (-wins[m] - losses[m], m))
        }
        listed = {model: share for model, share in shares.items() if share.of >= self.at_least}
        return Outcome(
            figures={
                "pairs of two models": sum(wins.values()),
                "pairs of one model": same,
                **{f"wins of {model}": share for model, share in listed.items()},
            },
            counts={"Images by model": {m: wins[m] + losses[m] for m in shares}},
            findings=[
                self._finding(model, share)
                for model, share in listed.items()
                if share.low > self.most or share.high < 1 - self.most
            ],
        )

    def _finding(self, model: str, share: Share) -> Finding:
        wins = share.value > 0.5
        return Finding(
            name="one_sided_model",
            severity="doubtful",
            count=share.of,
            share=share,
            what=f"{model} won {share} comparisons with other models",
            harm=f"the label can be told from the model alone, so that training may learn how "
            f"{model} looks {'and' if wins else 'and how to avoid it, and'} not what people prefer",
            advice="add pairs whose sides come from one model, or take fewer of these",
        )


def _columns(names: Collection[str]) -> tuple[str, str, bool] | None:
    """The two columns, and whether they are of the chosen and the rejected side."""
    known = sorted(name for name in names if _NAME.search(name))
    sides = {match[2].lower(): name for name in known if (match := _OF_SIDE.search(name))}
    if len(sides) == 2:
        return sides["chosen"], sides["rejected"], True
    places = [(match["stem"], match["end"], name) for name in known if (match := _of_place(name))]
    for stem, end, _ in places:
        both = [name for s, e, name in places if (s, e) == (stem, end)]
        if len(both) == 2:
            return both[0], both[1], False
    return None


def _of_place(name: str) -> re.Match[str] | None:
    return _OF_PLACE.fullmatch(name)


def _models_of(row: CheckedRow, columns: tuple[str, str, bool]) -> tuple[str, str] | None:
    """Of the chosen and of the rejected side."""
    first, second, by_side = columns
    models = _text(row.values.get(first)), _text(row.values.get(second))
    if "" in models or (not by_side and row.first_won is None):
        return None
    return models if by_side or row.first_won else models[::-1]


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return "" if value is None or isinstance(value, (list, dict)) else str(value).strip()
