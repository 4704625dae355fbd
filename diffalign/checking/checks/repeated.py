"""Rows that come several times, and images that come under several prompts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffalign.checking.checks.base import AbstractCheck, Finding, Outcome, of_all
from diffalign.checking.rows import CheckedRow, Examined, SeenAt

ANNOTATOR = re.compile(r"(annotator|user|rater|worker|labell?er|evaluator)(_?(id|name|uid))?", re.I)
"""Names of columns that say whose label it is."""


@dataclass(frozen=True, kw_only=True)
class Repeated(AbstractCheck):
    """The same preference in several rows, and one file under several prompts.

    An image may take part in several pairs of its prompt, as in Pick-a-Pic; that is counted and is
    no finding. Two rows on the same pair are repeated unless columns say that two people labelled
    them; with opposite labels they contradict each other.
    """

    title: ClassVar[str] = "Repeated rows and images"

    @classmethod
    def reads(cls, column: str) -> bool:
        return ANNOTATOR.fullmatch(column) is not None

    def look(self, data: Examined) -> Outcome:
        by_question: dict[Any, list[tuple[int, CheckedRow]]] = defaultdict(list)
        for number, row in data.pairs:
            if (question := question_of(data, number)) is not None:
                by_question[question].append((number, row))
        again, opposite = _repeated([rows for rows in by_question.values() if len(rows) > 1])
        elsewhere = _under_other_prompts(data, {number for rows in again for number in rows[1:]})
        in_pairs = sum(
            len({data.rows[place.row].origin for place in places}) > 1
            for places in data.seen.values()
        )
        findings = [
            self._repeated(data, again) if again else None,
            self._opposite(data, opposite) if opposite else None,
            self._elsewhere(data, elsewhere) if elsewhere and data.kind == "images" else None,
        ]
        return Outcome(
            figures={
                "repeated rows": sum(len(rows) - 1 for rows in again),
                "pairs with opposite labels": len(opposite),
                "images in several rows": in_pairs,
            },
            findings=[finding for finding in findings if finding is not None],
        )

    def _repeated(self, data: Examined, groups: Sequence[Sequence[int]]) -> Finding:
        count = sum(len(rows) - 1 for rows in groups)
        what = (
            "the prompt and both images"
            if data.kind == "images"
            else "the prompt and both responses"
        )
        return Finding(
            name="repeated_rows",
            severity="harmful",
            count=count,
            what=f"{of_all(count, len(data.pairs), 'pairs', 'repeat')} {what} of an earlier row",
            harm="they count several times, and may be held out and trained on at once",
            advice="keep one row of each",
            rows=[data.rows[number].name for rows in groups for number in rows[1:]],
            examples=[_both(data, rows) for rows in groups],
        )

    def _opposite(self, data: Examined, groups: Sequence[Sequence[int]]) -> Finding:
        verb = "holds" if len(groups) == 1 else "hold"
        return Finding(
            name="opposite_labels",
            severity="harmful",
            count=len(groups),
            what=f"{len(groups):,} pairs are in rows with opposite labels, and no column says that "
            f"two people gave them"
            if len(groups) > 1
            else "1 pair is in rows with opposite labels, and no column says that two people gave "
            "them",
            harm=f"their gradients cancel, whichever {verb} true",
            advice="ask again, keep the majority, or take them out",
            rows=[data.rows[number].name for rows in groups for number in rows],
            examples=[_both(data, rows) for rows in groups],
        )

    def _elsewhere(self, data: Examined, groups: Sequence[Sequence[SeenAt]]) -> Finding:
        count = sum(len(places) - 1 for places in groups)
        verb = "show" if count > 1 else "shows"
        return Finding(
            name="images_of_other_prompts",
            severity="harmful",
            count=count,
            what=f"{count:,} {'rows' if count > 1 else 'row'} {verb} an image that an earlier row "
            f"has under another prompt",
            harm="one of the captions does not belong to it",
            advice="look which, and correct or take out the other row",
            rows=[data.rows[place.row].name for places in groups for place in places[1:]],
            examples=groups,
        )


def question_of(data: Examined, number: int) -> Any:
    """What a row asks its annotator, whatever the label says; None where it cannot be told."""
    row = data.rows[number]
    if data.kind == "images":
        digests = row.digests
        if len(digests) != len(row.images) or len(set(digests)) != len(digests):
            return None
        return data.keys[number], frozenset(digests)
    if len(row.digests) != len(row.images):
        return None
    return row.prompt, row.digests, frozenset(r.digest for r in row.responses.values())


def label_of(row: CheckedRow) -> bytes | tuple[str, ...]:
    """Which side won, whatever place it has; of a row with one response, whether it is good."""
    if "chosen" in row.images:
        return row.digests[0]
    chosen = row.responses.get("chosen")
    return (*row.responses,) if len(row.responses) == 1 or chosen is None else chosen.digest


def annotator_of(row: CheckedRow) -> tuple[Any, ...] | None:
    """Who gave the label, by all columns that may say so; None where none does."""
    said = tuple(value for name, value in row.values.items() if ANNOTATOR.fullmatch(name))
    return said if any(value is not None for value in said) else None


def _repeated(
    groups: Sequence[Sequence[tuple[int, CheckedRow]]],
) -> tuple[list[list[int]], list[list[int]]]:
    """Numbers of rows that say the same twice, and of those that contradict each other."""
    again, opposite = [], []
    for rows in groups:
        by_annotator: dict[Any, list[tuple[int, CheckedRow]]] = defaultdict(list)
        for number, row in rows:
            by_annotator[annotator_of(row)].append((number, row))
        for own in by_annotator.values():
            numbers = [number for number, _ in own]
            if len({label_of(row) for _, row in own}) > 1:
                opposite.append(numbers)
            elif len(own) > 1:
                again.append(numbers)
    return again, opposite


def _under_other_prompts(data: Examined, explained: set[int]) -> list[list[SeenAt]]:
    """The first place of an image, and one of each row that has it under another prompt."""
    found = []
    for places in data.seen.values():
        first = places[0]
        others: dict[int, SeenAt] = {}
        for place in places[1:]:
            if place.row not in explained and data.keys[place.row] != data.keys[first.row]:
                others.setdefault(place.row, place)
        if others:
            found.append([first, *others.values()])
    return _once_a_row(found)


def _once_a_row(groups: Sequence[Sequence[SeenAt]]) -> list[list[SeenAt]]:
    """Without the rows that an earlier group has: both of their images come from one other row."""
    known: set[int] = set()
    kept = []
    for first, *others in groups:
        new = [place for place in others if place.row not in known]
        known |= {place.row for place in new}
        if new:
            kept.append([first, *new])
    return kept


def _both(data: Examined, numbers: Sequence[int]) -> list[SeenAt]:
    """The images of the first two rows."""
    return [SeenAt(number, side) for number in numbers[:2] for side in data.rows[number].images]
