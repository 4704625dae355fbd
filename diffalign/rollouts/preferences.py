"""Preferences of people within groups of images: a file of JSON lines, and the pairs it decides.

    {"group": "a-cat-0b1c-0", "ranking": [3, 0, [1, 2]]}     best first; 1 and 2 tie
    {"group": "a-dog-77f0-0", "good": [0, 4], "bad": [2]}    every good one above every bad one

or one JSON list, as the authors of D3PO keep them: a list of numbers for each group, in the order
in which the groups were generated; of two images the one with the larger number is preferred, and
equal numbers tie (scripts/train.py of yk7333/d3po).

    [[0, 0, 1], [1, 0, 0]]

Images that a line leaves out are undecided. Several lines on one group, such as those of several
people, add up; they may not contradict each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import combinations, product
from math import comb
from pathlib import Path
from typing import Any

from diffalign.errors import DataError, did_you_mean
from diffalign.files import numbered_lines, parse_json_line
from diffalign.parsing import parse_json, shortly

_FORMS = (
    '{"group": ID, "ranking": [best, ..., worst]} or {"group": ID, "good": [...], "bad": [...]}'
)


@dataclass(frozen=True)
class Verdict:
    """The preferences within one group."""

    decided: tuple[tuple[int, int], ...]
    """Index of a preferred image, index of the other; each pair once, in a fixed order."""
    tied: int
    """Pairs that were said to be equal, and that nobody decided."""
    undecided: int
    """Pairs of which nothing was said."""


def read_preferences(path: Path, groups: Mapping[str, int]) -> dict[str, Verdict]:
    """The verdict on every group that the file speaks of.

    Args:
        path: of JSON lines, in which blank ones are fine, or of one JSON list.
        groups: number of images of each group, by id, in the order in which they were generated.

    Raises:
        DataError: naming line and group, for what is malformed, unknown or contradictory.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of preferences")
    statements: dict[str, list[_Statement]] = {}
    for row, place in _rows(path, groups):
        statement = _read_statement(row, place, groups)
        statements.setdefault(statement.group, []).append(statement)
    return {name: _verdict(said, groups[name]) for name, said in statements.items()}


@dataclass(frozen=True)
class _Place:
    path: Path
    line: int
    what: str = "line"

    def refuse(self, complaint: str) -> DataError:
        return DataError(f"{self.path}: {self.what} {self.line} {complaint}")


def _rows(path: Path, groups: Mapping[str, int]) -> Iterator[tuple[Any, _Place]]:
    """The preferences within a group, and the line that has them."""
    lines = list(numbered_lines(path))
    if lines and lines[0][1].lstrip().startswith("["):
        numbers = parse_json("\n".join(line for _, line in lines), path)
        yield from _rankings(numbers, path, groups)
        return
    for number, line in lines:
        yield parse_json_line(line, path, number), _Place(path, number)


def _rankings(
    numbers: Any, path: Path, groups: Mapping[str, int]
) -> Iterator[tuple[dict[str, Any], _Place]]:
    """D3PO's numbers as rankings, with lists for images that tie."""
    if len(numbers) != len(groups):
        raise DataError(
            f"{path}: is a list of {len(numbers)} lists of numbers, as D3PO has them, and there "
            f"are {len(groups)} groups: it must have one for each, in the order in which they were "
            f"generated. With fewer, write a line for each, {_FORMS}"
        )
    for position, (name, scores) in enumerate(zip(groups, numbers, strict=True)):
        place = _Place(path, position, "list number")
        if not isinstance(scores, list) or len(scores) != groups[name]:
            raise place.refuse(
                f"must hold a number for each of the {groups[name]} images of group {name!r}, got "
                f"{shortly(scores)}"
            )
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, (int, float)) or score != score:
                raise place.refuse(f"must hold numbers, got {shortly(score)}")
        levels = sorted(set(scores), reverse=True)
        ranking = [[i for i, score in enumerate(scores) if score == level] for level in levels]
        yield {"group": name, "ranking": ranking}, place


@dataclass(frozen=True)
class _Statement:
    """One line: images in classes, best first; members of a class tie."""

    place: _Place
    group: str
    classes: tuple[tuple[int, ...], ...]

    def decided(self) -> Iterator[tuple[int, int]]:
        for better, worse in combinations(self.classes, 2):
            yield from product(better, worse)

    def tied(self) -> Iterator[frozenset[int]]:
        for members in self.classes:
            yield from map(frozenset, combinations(members, 2))


def _read_statement(row: Any, place: _Place, groups: Mapping[str, int]) -> _Statement:
    keys = set(row) if isinstance(row, dict) else set()
    if keys not in ({"group", "ranking"}, {"group", "good", "bad"}):
        given = ", ".join(sorted(keys)) or type(row).__name__
        raise place.refuse(f"must be {_FORMS}, and has {given}")
    name = row["group"]
    if not isinstance(name, str) or name not in groups:
        hint = did_you_mean(str(name), groups)
        raise place.refuse(f"names the group {name!r}, which is none of the {len(groups)}.{hint}")
    for key in keys - {"group"}:
        if not isinstance(row[key], list):
            raise place.refuse(f"must give a list of images as {key}, got {row[key]!r}")
    classes = row["ranking"] if "ranking" in row else [row["good"], row["bad"]]
    members = tuple(tuple(item) if isinstance(item, list) else (item,) for item in classes)
    statement = _Statement(place, name, members)
    _check_indices(statement, groups[name])
    return statement


def _check_indices(statement: _Statement, count: int) -> None:
    place, name = statement.place, statement.group
    indices = [index for members in statement.classes for index in members]
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool):
            raise place.refuse(
                f"must give the images of group {name!r} as whole numbers, got {shortly(index)}"
            )
        if not 0 <= index < count:
            raise place.refuse(
                f"names image {index}, and group {name!r} has images 0 to {count - 1}"
            )
        if indices.count(index) > 1:
            raise place.refuse(
                f"contradicts itself: it gives image {index} of group {name!r} two places"
            )


def _verdict(statements: list[_Statement], count: int) -> Verdict:
    decided = dict.fromkeys(pair for said in statements for pair in said.decided())
    _refuse_contradiction(statements, decided)
    known = {frozenset(pair) for pair in decided}
    tied = {pair for said in statements for pair in said.tied()} - known
    return Verdict(tuple(decided), len(tied), comb(count, 2) - len(known) - len(tied))


def _refuse_contradiction(
    statements: list[_Statement], decided: Mapping[tuple[int, int], None]
) -> None:
    order: TopologicalSorter[int] = TopologicalSorter()
    for better, worse in decided:
        order.add(worse, better)
    try:
        order.prepare()
    except CycleError as error:
        images = " over ".join(map(str, error.args[1]))
        lines = ", ".join(str(said.place.line) for said in statements)
        raise DataError(
            f"{statements[0].place.path}: the lines {lines} on group {statements[0].group!r} "
            f"contradict each other: together they put image {images}. Settle it in the file, or "
            f"remove the lines"
        ) from error
