"""Files that AMBER publishes: annotations, associated words, safe words, queries; and responses.

Source: `data/` of junyangwang0410/AMBER.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from diffalign.benchmarks.saved_responses import (
    RESPONSE_KEYS,
    field_of,
    read_objects,
    text_of,
)
from diffalign.errors import DataError
from diffalign.files import numbered_lines, read_json
from diffalign.parsing import checked, shortly

Dimension = Literal["existence", "state", "number", "action", "relation"]

DIMENSIONS: Mapping[str, Dimension] = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
"""Dimensions of the types of `annotations.json`. Questions on relations have two types there,
those answered with yes and those answered with no; every other type is refused."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The truth about one image that is to be described."""

    item_id: int
    truth: tuple[str, ...]
    """Objects in the image; an object that is there twice is listed twice."""
    hallucinations: tuple[str, ...]
    """Objects that one might wrongly expect there."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One yes-or-no question."""

    item_id: int
    dimension: Dimension
    label: Literal["yes", "no"]


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Scenes and questions by id: `annotations.json`."""

    scenes: Mapping[int, Scene]
    questions: Mapping[int, Question]

    def __len__(self) -> int:
        return len(self.scenes) + len(self.questions)


@dataclass(frozen=True)
class Relations:
    """Words that may stand for one another: `relation.json`."""

    associated: Mapping[str, Sequence[str]]

    @cached_property
    def words(self) -> frozenset[str]:
        """Every word of the table; a noun counts only if it is one of them."""
        return frozenset(self.associated).union(*self.associated.values())

    def meaning(self, objects: Sequence[str]) -> list[tuple[str, int]]:
        """Words that stand for one of some objects, each with the place of its object.

        In the order in which the released code searches: first the associations of all objects,
        then the objects themselves. The first hit is taken, so that a word which is an association
        of one object and itself another counts for the first alone.
        """
        return [
            *((word, i) for i, name in enumerate(objects) for word in self.associated[name]),
            *((name, i) for i, name in enumerate(objects)),
        ]


def read_annotations(path: Path) -> Annotations:
    """`annotations.json`: scenes of type generative, and questions of the other types.

    Raises:
        DataError: an item is neither, or an id is there twice.
    """
    scenes: dict[int, Scene] = {}
    questions: dict[int, Question] = {}
    for number, row in enumerate(read_objects(path), start=1):
        item_id = _item_id(row, path, number)
        kind = field_of(row, ("type",), path=path, number=number)
        truth = field_of(row, ("truth",), path=path, number=number)
        if item_id in scenes or item_id in questions:
            raise DataError(f"{path}: the id {item_id} is there twice")
        if kind == "generative" and isinstance(truth, list):
            absent = field_of(row, ("hallu",), path=path, number=number)
            place = f"{path}: item {number}"
            scenes[item_id] = Scene(
                item_id=item_id,
                truth=checked(tuple[str, ...], truth, f"{place}: truth"),
                hallucinations=checked(tuple[str, ...], absent, f"{place}: hallu"),
            )
        elif isinstance(kind, str) and kind in DIMENSIONS and truth in ("yes", "no"):
            questions[item_id] = Question(item_id=item_id, dimension=DIMENSIONS[kind], label=truth)
        else:
            raise DataError(
                f"{path}: item {number} of type {shortly(kind)} with truth {shortly(truth)} is "
                f"not one of AMBER: types are generative, {', '.join(DIMENSIONS)}"
            )
    return Annotations(scenes=scenes, questions=questions)


def read_relations(path: Path, annotations: Annotations) -> Relations:
    """`relation.json`: `{word: [associated words]}`.

    Raises:
        DataError: it is something else, or lacks an object of the annotations.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise DataError(f"{path}: must be one object of lists, {{word: [associated words]}}")
    content = checked(dict[str, list[str]], content, path)
    needed = {
        name for scene in annotations.scenes.values() for name in scene.truth + scene.hallucinations
    }
    lacking = sorted(needed - set(content))
    if lacking:
        raise DataError(
            f"{path}: has no entry for {', '.join(lacking[:5])}, which the annotations name; take "
            "both files from the same version of AMBER"
        )
    return Relations(content)


def read_safe_words(path: Path) -> frozenset[str]:
    """`safe_words.txt`: a word a line."""
    absent = "there is no such file; it is data/safe_words.txt of AMBER"
    return frozenset(line.strip() for _, line in numbered_lines(path, absent=absent))


def read_responses(path: Path, annotations: Annotations) -> dict[int, str]:
    """`{id, response}`, a JSON list or one a line: the response by id.

    Raises:
        DataError: an id is there twice or is not annotated.
    """
    rows = read_objects(path)
    ids = [_item_id(row, path, number) for number, row in enumerate(rows, start=1)]
    repeated = [item_id for item_id, count in Counter(ids).items() if count > 1]
    unknown = [i for i in ids if i not in annotations.scenes and i not in annotations.questions]
    there = [*annotations.scenes, *annotations.questions]
    for found, complaint in ((repeated, "stand more than once"), (unknown, "are not annotated")):
        if found:
            listed = ", ".join(map(str, found[:5]))
            raise DataError(
                f"{path}: {len(found)} ids {complaint}, for example {listed}; the annotations have "
                f"{min(there, default='none')} to {max(there, default='none')}"
            )
    return {
        item_id: text_of(row, ("response", *RESPONSE_KEYS), path=path, number=number)
        for number, (item_id, row) in enumerate(zip(ids, rows, strict=True), start=1)
    }


@dataclass(frozen=True, kw_only=True)
class Query:
    """A question about an image, or the request to describe it."""

    image: str
    text: str


def read_queries(paths: Sequence[Path]) -> dict[int, Query]:
    """The published queries, `{id, image, query}`, by id."""
    return {
        _item_id(row, path, number): Query(
            image=text_of(row, ("image",), path=path, number=number),
            text=text_of(row, ("query",), path=path, number=number),
        )
        for path in paths
        for number, row in enumerate(read_objects(path), start=1)
    }


def _item_id(row: Mapping[str, Any], path: Path, number: int) -> int:
    value = field_of(row, ("id",), path=path, number=number)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,18}", str(value).strip()):
        raise DataError(f"{path}: item {number}: id must be a whole number, got {shortly(value)}")
    return int(value)
