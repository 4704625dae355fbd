"""POPE: yes or no, is there such an object in the image?

Half of the questions of a split are to be answered with yes, and `yes` is the positive class, so a
model that agrees to everything has recall 100 and accuracy 50: the share of yes is next to them.

Source: Li et al. 2023, Evaluating object hallucination in large vision-language models,
arXiv:2305.10355; parsing and formulas as in their released `evaluate.py` (RUCAIBox/POPE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.benchmarks.report import Measure
from diffalign.benchmarks.saved_responses import read_objects, refuse_repeated, responses_to
from diffalign.errors import DataError
from diffalign.intervals import Tally, ratio
from diffalign.parsing import shortly
from diffalign.response_rules.yes_no import YesNo, parse_response, says


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one image."""

    question_id: str
    image: str
    text: str
    label: YesNo


@dataclass(frozen=True, kw_only=True)
class CheckedResponse:
    """A response next to its question."""

    question: Question
    response: str

    @property
    def parsed(self) -> YesNo:
        return parse_response(self.response)

    @property
    def said(self) -> YesNo | None:
        return says(self.response)

    def row(self) -> dict[str, Any]:
        """For a file of details."""
        question = self.question
        return {
            "question_id": question.question_id,
            "image": question.image,
            "question": question.text,
            "label": question.label,
            "answer": self.response,
            "parsed": self.parsed,
            "said": self.said,
        }


def read_questions(path: Path) -> list[Question]:
    """The questions of one split: `{question_id, image, text, label}`, one a line.

    Raises:
        DataError: an item lacks a key, a label is neither yes nor no, or an id is twice.
    """
    questions = []
    for number, row in enumerate(read_objects(path), start=1):
        missing = [key for key in ("question_id", "image", "text", "label") if key not in row]
        if missing:
            raise DataError(
                f"{path}: item {number} has no {', '.join(missing)} (keys: {', '.join(row)}); "
                "a question of POPE has question_id, image, text and label"
            )
        if row["label"] not in ("yes", "no"):
            raise DataError(
                f"{path}: item {number}: label must be yes or no, got {shortly(row['label'])}"
            )
        question = Question(
            question_id=str(row["question_id"]),
            image=str(row["image"]),
            text=str(row["text"]),
            label=row["label"],
        )
        questions.append(question)
    refuse_repeated([question.question_id for question in questions], path)
    return questions


def read_responses(path: Path, questions: Sequence[Question]) -> list[CheckedResponse]:
    """Responses next to their questions, in the order of the questions.

    A row has a question_id and the response as `answer`, `response`, `caption` or `text`. Where no
    row has an id, as in POPE's own files, row n answers question n, and there must be as many.

    Raises:
        DataError: a response is to no question, a question has two, or ids are missing in part.
    """
    texts = responses_to(path, [question.question_id for question in questions])
    return [
        CheckedResponse(question=question, response=texts[question.question_id])
        for question in questions
        if question.question_id in texts
    ]


COUNTS = (
    "questions",
    "true_positives",
    "false_positives",
    "true_negatives",
    "false_negatives",
    "words",
    "neither_yes_nor_no",
    "no_read_as_yes",
    "right_in_words",
)


def tally(checked: Sequence[CheckedResponse], images: Sequence[str]) -> Tally:
    """The four kinds of responses, their number and their words, by image.

    Args:
        checked: responses of one split.
        images: the clusters; every image of the responses is one of them.

    Returns:
        Arrays of shape [images] by the names of `COUNTS`.
    """
    places = {image: place for place, image in enumerate(images)}
    counts = np.zeros((len(COUNTS), len(places)))
    for item in checked:
        said, label = item.parsed, item.question.label
        counts[:, places[item.question.image]] += (
            1,
            said == "yes" and label == "yes",
            said == "yes" and label == "no",
            said == "no" and label == "no",
            said == "no" and label == "yes",
            len(item.response.split()),
            item.said is None,
            item.said == "no" and said == "yes",
            item.said == label,
        )
    return dict(zip(COUNTS, counts, strict=True))


def accuracy(t: Tally) -> NDArray[np.float64]:
    """Right responses in percent."""
    return 100 * ratio(t["true_positives"] + t["true_negatives"], t["questions"])


def precision(t: Tally) -> NDArray[np.float64]:
    """Right among those answered with yes, in percent."""
    return 100 * ratio(t["true_positives"], t["true_positives"] + t["false_positives"])


def recall(t: Tally) -> NDArray[np.float64]:
    """Answered with yes among those where yes is right, in percent."""
    return 100 * ratio(t["true_positives"], t["true_positives"] + t["false_negatives"])


def f1(t: Tally) -> NDArray[np.float64]:
    """Harmonic mean of precision and recall, in percent."""
    hits = 2 * t["true_positives"]
    return 100 * ratio(hits, hits + t["false_positives"] + t["false_negatives"])


def yes_ratio(t: Tally) -> NDArray[np.float64]:
    """Answered with yes, in percent."""
    return 100 * ratio(t["true_positives"] + t["false_positives"], t["questions"])


MEASURES: Mapping[str, Measure] = {
    "accuracy": Measure("accuracy", "percent", accuracy),
    "precision": Measure("precision (yes is positive)", "percent", precision),
    "recall": Measure("recall", "percent", recall),
    "f1": Measure("F1", "percent", f1),
    "yes_ratio": Measure("answered with yes", "percent", yes_ratio),
    "neither_ratio": Measure(
        "neither yes nor no (count as yes)",
        "percent",
        lambda t: 100 * ratio(t["neither_yes_nor_no"], t["questions"]),
    ),
    "mean_length": Measure(
        "mean length in words", "words", lambda t: ratio(t["words"], t["questions"])
    ),
}
