"""AMBER: objects of free descriptions, and yes-or-no questions, about one set of images.

In the free task the nouns of a description are held against what is in the image and against
what one might wrongly expect there. In the other the positive class is `no`: whoever says yes to
everything has recall 0.

Figures are as the released `inference.py` prints them: percent with one decimal, denominators
starting at 0.001, F1 from rounded precision and recall.

Source: Wang et al. 2023, AMBER, arXiv:2311.07397; rules as in junyangwang0410/AMBER.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from diffalign.benchmarks.nouns import Similar
from diffalign.benchmarks.report import Measure
from diffalign.benchmarks.saved_responses import (
    RESPONSE_KEYS,
    field_of,
    read_objects,
    text_of,
)
from diffalign.errors import DataError
from diffalign.files import numbered_lines, read_json
from diffalign.intervals import Tally, ratio
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
"""What the types of `annotations.json` ask about. Questions on relations have two types there,
those answered with yes and those answered with no; every other type is refused."""
ATTRIBUTES: tuple[Dimension, ...] = ("state", "number", "action")

_START = 0.001
"""Where the released code's denominators start (`metrics.txt`)."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a description of one image is held against."""

    item_id: int
    truth: tuple[str, ...]
    """Objects in the image; an object that is there twice is twice."""
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
    """What AMBER knows, by id."""

    scenes: Mapping[int, Scene]
    questions: Mapping[int, Question]

    def __len__(self) -> int:
        return len(self.scenes) + len(self.questions)


@dataclass(frozen=True)
class Relations:
    """Which words may stand for which: `relation.json`."""

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


@dataclass(frozen=True, kw_only=True)
class JudgedDescription:
    """The nouns of one description, held against its scene."""

    scene: Scene
    response: str
    nouns: tuple[str, ...]
    """Those that are words of the relations, safe words and repetitions included."""
    hallucinated: tuple[str, ...]
    """Those that stand for nothing in the image."""
    covered: frozenset[int]
    """Places of the true objects that were mentioned."""
    expected: frozenset[int]
    """Places of the expected, absent objects that were mentioned."""

    def row(self) -> dict[str, Any]:
        """For a file of details."""
        return {
            "id": self.scene.item_id,
            "response": self.response,
            "nouns": self.nouns,
            "hallucinated": self.hallucinated,
            "covered": [self.scene.truth[i] for i in sorted(self.covered)],
            "expected": [self.scene.hallucinations[i] for i in sorted(self.expected)],
        }


def judge_description(
    scene: Scene,
    response: str,
    nouns: Sequence[str],
    *,
    relations: Relations,
    safe_words: Collection[str],
    similar: Similar,
) -> JudgedDescription:
    """Hold the nouns of a description against its scene, noun by noun.

    A safe word is passed over. A word for a true object covers it. A word for an expected object,
    or one similar to such a word, marks that object and is looked at further: where it is similar
    to a word for a true object it covers that one, else it is hallucinated.

    Args:
        scene: what is in the image.
        response: the description, for the record.
        nouns: its nouns; those that are no word of the relations are dropped.
        relations: which words may stand for which.
        safe_words: never hallucinated, although they count as nouns.
        similar: whether two words mean nearly the same.

    Source: main loop of the released `inference.py`.
    """
    known = relations.words
    kept = tuple(noun for noun in nouns if noun in known)
    truth, absent = relations.meaning(scene.truth), relations.meaning(scene.hallucinations)
    hallucinated: list[str] = []
    covered: set[int] = set()
    expected: set[int] = set()
    for noun in kept:
        if noun in safe_words:
            continue
        exact = _first(truth, noun, str.__eq__)
        if exact is not None:
            covered.add(exact)
            continue
        marked = (_first(absent, noun, str.__eq__), _first(absent, noun, similar))
        expected |= {place for place in marked if place is not None}
        near = _first(truth, noun, similar)
        if near is None:
            hallucinated.append(noun)
        else:
            covered.add(near)
    return JudgedDescription(
        scene=scene,
        response=response,
        nouns=kept,
        hallucinated=tuple(hallucinated),
        covered=frozenset(covered),
        expected=frozenset(expected),
    )


def _first(meaning: Sequence[tuple[str, int]], noun: str, fits: Similar) -> int | None:
    """The place of the first object for which a word fits the noun."""
    return next((place for word, place in meaning if fits(noun, word)), None)


@dataclass(frozen=True, kw_only=True)
class JudgedResponse:
    """A response next to its question."""

    question: Question
    response: str

    @property
    def correct(self) -> bool:
        """Whether it is the right one of exactly `Yes` and `No`; anything else is wrong."""
        return self.response == self.question.label.capitalize()

    def row(self) -> dict[str, Any]:
        """For a file of details."""
        return {
            "id": self.question.item_id,
            "dimension": self.question.dimension,
            "label": self.question.label,
            "response": self.response,
            "correct": self.correct,
        }


DESCRIPTION_COUNTS = (
    "descriptions",
    "words",
    "nouns",
    "hallucinated_nouns",
    "descriptions_without_hallucination",
    "true_objects",
    "covered_objects",
    "expected_objects",
    "expected_objects_mentioned",
)
RESPONSE_COUNTS = (
    "questions",
    "correct",
    "label_no",
    "answered_no",
    "correct_no",
    "neither_yes_nor_no",
)


def description_tally(
    judged: Sequence[JudgedDescription], clusters: Sequence[str], cluster_of: Mapping[int, str]
) -> Tally:
    """Counts of descriptions, shape [clusters], by the names of `DESCRIPTION_COUNTS`.

    Args:
        judged: descriptions.
        clusters: what the bootstrap samples.
        cluster_of: which of them an item belongs to.
    """
    places = {cluster: place for place, cluster in enumerate(clusters)}
    counts = np.zeros((len(DESCRIPTION_COUNTS), len(places)))
    for item in judged:
        counts[:, places[cluster_of[item.scene.item_id]]] += (
            1,
            len(item.response.split()),
            len(item.nouns),
            len(item.hallucinated),
            not item.hallucinated,
            len(item.scene.truth),
            len(item.covered),
            len(item.scene.hallucinations),
            len(item.expected),
        )
    return dict(zip(DESCRIPTION_COUNTS, counts, strict=True))


def response_tally(
    judged: Sequence[JudgedResponse], clusters: Sequence[str], cluster_of: Mapping[int, str]
) -> Tally:
    """Counts of responses, shape [clusters], by the names of `RESPONSE_COUNTS`; see above."""
    places = {cluster: place for place, cluster in enumerate(clusters)}
    counts = np.zeros((len(RESPONSE_COUNTS), len(places)))
    for item in judged:
        label_no, answered_no = item.question.label == "no", item.response == "No"
        counts[:, places[cluster_of[item.question.item_id]]] += (
            1,
            item.correct,
            label_no,
            answered_no,
            label_no and answered_no,
            item.response not in ("Yes", "No"),
        )
    return dict(zip(RESPONSE_COUNTS, counts, strict=True))


def published_percent(
    part: NDArray[np.float64], whole: NDArray[np.float64], *, start: float = _START
) -> NDArray[np.float64]:
    """Part of the whole in percent with one decimal, the whole starting a little above zero."""
    return one_decimal(100 * (part / (whole + start)))


@np.vectorize
def one_decimal(value: float) -> float:
    """Rounded as Python rounds: to the nearest, by the value that the number really has."""
    return round(float(value), 1)


def _hal(t: Tally) -> NDArray[np.float64]:
    clean = t["descriptions_without_hallucination"] / (t["descriptions"] + _START)
    return one_decimal(100 - 100 * clean)


DESCRIPTION_MEASURES: Mapping[str, Measure] = {
    "chair": Measure(
        "CHAIR, nouns hallucinated",
        "percent",
        lambda t: published_percent(t["hallucinated_nouns"], t["nouns"]),
    ),
    "cover": Measure(
        "Cover, true objects mentioned (recall)",
        "percent",
        lambda t: published_percent(t["covered_objects"], t["true_objects"]),
    ),
    "hal": Measure("Hal, descriptions that hallucinate", "percent", _hal),
    "cog": Measure(
        "Cog, expected absent objects mentioned",
        "percent",
        lambda t: published_percent(t["expected_objects_mentioned"], t["expected_objects"]),
    ),
    "mean_length": Measure(
        "mean length in words", "words", lambda t: ratio(t["words"], t["descriptions"])
    ),
}


def response_measures(*, start: float = _START, epsilon: float = 1e-4) -> dict[str, Measure]:
    """Accuracy, precision, recall and F1 of the response no, in percent with one decimal.

    Args:
        start: where denominators start; 0.003 for the three kinds of attributes together.
        epsilon: what is next to precision plus recall in F1; 1e-3 for existence.
    """

    def precision(t: Tally) -> NDArray[np.float64]:
        return published_percent(t["correct_no"], t["answered_no"], start=start)

    def recall(t: Tally) -> NDArray[np.float64]:
        return published_percent(t["correct_no"], t["label_no"], start=start)

    def f1(t: Tally) -> NDArray[np.float64]:
        p, r = precision(t) / 100, recall(t) / 100
        return one_decimal(100 * (2 * p * r / (p + r + epsilon)))

    return {
        "accuracy": Measure(
            "accuracy",
            "percent",
            lambda t: published_percent(t["correct"], t["questions"], start=start),
        ),
        "precision": Measure("precision (no is positive)", "percent", precision),
        "recall": Measure("recall", "percent", recall),
        "f1": Measure("F1", "percent", f1),
    }


PARTS: Mapping[str, tuple[tuple[Dimension, ...], Mapping[str, Measure]]] = {
    "existence": (("existence",), response_measures(epsilon=1e-3)),
    "attribute": (ATTRIBUTES, response_measures(start=len(ATTRIBUTES) * _START)),
    "state": (("state",), response_measures()),
    "number": (("number",), response_measures()),
    "action": (("action",), response_measures()),
    "relation": (("relation",), response_measures()),
}
"""The dimensions as they are reported: what they are made of, and how they are counted."""


def read_annotations(path: Path) -> Annotations:
    """`annotations.json`: scenes of type generative, and questions of the other types.

    Raises:
        DataError: an item is neither, or an id is twice.
    """
    scenes: dict[int, Scene] = {}
    questions: dict[int, Question] = {}
    for number, row in enumerate(read_objects(path), start=1):
        item_id = _item_id(row, path, number)
        kind = field_of(row, ("type",), path=path, number=number)
        truth = field_of(row, ("truth",), path=path, number=number)
        if item_id in scenes or item_id in questions:
            raise DataError(f"{path}: the id {item_id} is twice")
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
        DataError: an id is twice or is not annotated.
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
    """What a model is asked about an image."""

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


def yes_or_no(response: str) -> str:
    """`Yes` or `No` where a free response begins with that word in any case; else the response
    itself.

    AMBER counts nothing but these two spellings, and leaves it to the user to get there.
    """
    word = re.match(r"\W*(yes|no)\b", response, re.IGNORECASE)
    return word[1].capitalize() if word else response


def _item_id(row: Mapping[str, Any], path: Path, number: int) -> int:
    value = field_of(row, ("id",), path=path, number=number)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,18}", str(value).strip()):
        raise DataError(f"{path}: item {number}: id must be a whole number, got {shortly(value)}")
    return int(value)
