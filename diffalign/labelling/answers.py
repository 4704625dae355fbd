"""What people answered: one line of JSON an answer, on the disk before anything else happens.

    {"person": "Ana", "item": "a-fox-0b1c: base 0 | new 0", "order": [1, 0], "answer": "left", ...}
    {"person": "Ana", "item": "a-fox-0b1c: base 0 | new 0", "answer": "undo"}

The file is only ever added to, and says in which order the sides were shown, so that nothing that
was shown has to be worked out again. An undo takes back the last answer of its person.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

from diffalign.errors import DataError
from diffalign.files import append_json_lines, flush, read_rows, writing

ANSWERS = "answers.jsonl"
"""The file, in the folder of the labels."""

Choice = Literal["left", "right", "tie", "both_bad", "skip", "ranking"]
"""What a person can say of an item: of two sides as they were shown, or a ranking of several."""
Verdict = Literal["first", "second", "tie", "both_bad"]
"""What an answer says of two sides, by their order in the data."""
VERDICTS: tuple[Verdict, ...] = ("first", "second", "tie", "both_bad")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One line of the file."""

    person: str
    item: str
    answer: Literal["left", "right", "tie", "both_bad", "skip", "ranking", "undo"]
    order: tuple[int, ...] = ()
    """The sides as they were shown, from left to right."""
    ranking: tuple[tuple[int, ...], ...] | None = None
    """Sides in classes, best first; those of a class tie, and those left out are undecided."""
    seconds: float | None = None
    """For which the item was seen, by the browser's clock and without what was hidden."""
    digests: tuple[str, ...] = ()
    """SHA-256 of each side, in the order of the data: what was judged."""

    def verdicts(self) -> Iterator[tuple[tuple[int, int], Verdict]]:
        """The two sides that the answer says something of, the first one first, and what."""
        if self.answer in ("left", "right"):
            won = self.order[self.answer == "right"]
            yield (0, 1), "first" if won == 0 else "second"
        elif self.answer in ("tie", "both_bad"):
            yield (0, 1), "tie" if self.answer == "tie" else "both_bad"
        place = {side: n for n, members in enumerate(self.ranking or ()) for side in members}
        for one, other in combinations(sorted(place), 2):
            if place[one] == place[other]:
                yield (one, other), "tie"
            else:
                yield (one, other), "first" if place[one] < place[other] else "second"


def check_ranking(ranking: Sequence[Sequence[int]], sides: int) -> None:
    """Raise ValueError unless sides are in one place each, and two of them are compared."""
    named = [side for members in ranking for side in members]
    if any(isinstance(side, bool) or not isinstance(side, int) for side in named):
        raise ValueError("a ranking is of whole numbers")
    if len(set(named)) != len(named) or not set(named) <= set(range(sides)):
        raise ValueError(f"a ranking names each of the {sides} sides once at most")
    if len(named) < 2 or not all(ranking):
        raise ValueError("a ranking compares two sides at least")


class AnswerFile:
    """The answers of all people: those that stand, by person in the order of answering."""

    def __init__(self, folder: Path) -> None:
        """Read what is there.

        Raises:
            DataError: a line is no answer, or takes back one that is not the last.
        """
        self.path = folder / ANSWERS
        self.by_person: dict[str, dict[str, Answer]] = {}
        """Person -> item -> answer, the last one last."""
        for number, line in enumerate(self._read(), start=1):
            try:
                self._apply(line)
            except ValueError as error:
                raise DataError(
                    f"{self.path}: line {number}: {error}. The file is written by diffalign label "
                    f"alone: put it back as it was, or take the line out"
                ) from error

    def _read(self) -> list[Answer]:
        return read_rows(Answer, self.path) if self.path.is_file() else []

    def add(self, line: Answer) -> None:
        """Write an answer or an undo, wait for the disk, and count it.

        Raises:
            DataError: the disk refuses; nothing is counted then.
            ValueError: the item has an answer of this person, or is not the last one to take back.
        """
        self._check(line)
        with writing(self.path):
            is_new = not self.path.exists()
            append_json_lines(self.path, [_plain(line)])
            if is_new:
                flush(self.path.parent)
        self._apply(line)

    def _check(self, line: Answer) -> None:
        own = self.by_person.get(line.person, {})
        if line.answer == "undo":
            if not own or next(reversed(own)) != line.item:
                raise ValueError(f"{line.item!r} is not the last answer of {line.person!r}")
        elif line.item in own:
            raise ValueError(f"{line.person!r} has answered {line.item!r} before")

    def _apply(self, line: Answer) -> None:
        self._check(line)
        own = self.by_person.setdefault(line.person, {})
        if line.answer == "undo":
            own.popitem()
        else:
            own[line.item] = line

    def all(self) -> Iterator[Answer]:
        """Every answer that stands, person by person."""
        for own in self.by_person.values():
            yield from own.values()


def _plain(line: Answer) -> Mapping[str, object]:
    return {name: value for name, value in asdict(line).items() if value not in (None, ())}
