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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.benchmarks.amber.files import Dimension, Question, Relations, Scene
from diffalign.benchmarks.report import Measure
from diffalign.intervals import Tally, ratio
from diffalign.response_rules.words import Similar

ATTRIBUTES: tuple[Dimension, ...] = ("state", "number", "action")

_START = 0.001
"""Where the released code's denominators start (`metrics.txt`)."""


@dataclass(frozen=True, kw_only=True)
class CheckedDescription:
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


def check_description(
    scene: Scene,
    response: str,
    nouns: Sequence[str],
    *,
    relations: Relations,
    safe_words: Collection[str],
    similar: Similar,
) -> CheckedDescription:
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
    return CheckedDescription(
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
class CheckedResponse:
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
    checked: Sequence[CheckedDescription], clusters: Sequence[str], cluster_of: Mapping[int, str]
) -> Tally:
    """Counts of descriptions, shape [clusters], by the names of `DESCRIPTION_COUNTS`.

    Args:
        checked: descriptions.
        clusters: what the bootstrap samples.
        cluster_of: which of them an item belongs to.
    """
    places = {cluster: place for place, cluster in enumerate(clusters)}
    counts = np.zeros((len(DESCRIPTION_COUNTS), len(places)))
    for item in checked:
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
    checked: Sequence[CheckedResponse], clusters: Sequence[str], cluster_of: Mapping[int, str]
) -> Tally:
    """Counts of responses, shape [clusters], by the names of `RESPONSE_COUNTS`; see above."""
    places = {cluster: place for place, cluster in enumerate(clusters)}
    counts = np.zeros((len(RESPONSE_COUNTS), len(places)))
    for item in checked:
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


def yes_or_no(response: str) -> str:
    """`Yes` or `No` where a free response begins with that word in any case; else the response
    itself.

    AMBER counts nothing but these two spellings, and leaves it to the user to get there.
    """
    word = re.match(r"\W*(yes|no)\b", response, re.IGNORECASE)
    return word[1].capitalize() if word else response
