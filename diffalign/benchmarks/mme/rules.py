"""MME: two yes-or-no questions an image, one to be answered with yes and one with no.

Accuracy counts questions, accuracy+ images of which both are right, and the score of a task is the
sum of both in percent, at most 200. The four tasks about objects, existence, count, position and
color, are those by which hallucination is measured; their scores sum up to at most 800.

*Oddities that published figures contain, and that are therefore kept:* a response is read in its
first four characters alone, where `yes` is looked for before `no`: `nothing` and `now` are a no,
and `The answer is yes` is neither. What is neither counts as wrong in accuracy, and nowhere in
precision and recall. A published file has no ids: two lines after each other are one image, so that
one line too many shifts all that follow. Here that is an error.

Source: Fu et al. 2023, MME, arXiv:2306.13394; as in the authors' calculation.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from diffalign.benchmarks.closed_questions import CheckedResponse
from diffalign.benchmarks.report import Measure
from diffalign.errors import DataError
from diffalign.files import read_text
from diffalign.intervals import Tally, ratio
from diffalign.parsing import shortly

YesNo = Literal["yes", "no"]
OBJECT_TASKS = ("existence", "count", "position", "color")
"""Those about objects."""
TASKS = (
    *OBJECT_TASKS,
    *("posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
_READ = 4
"""Characters of a response that are read."""
_IMAGES = (".jpg", ".png", ".jpeg")


def parse_response(response: str) -> YesNo | None:
    """Yes or no in the first four characters, yes looked for first; None where neither is there."""
    start = response.lower()[:_READ]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else None


@dataclass(frozen=True, kw_only=True)
class Question:
    """One of the two questions of an image."""

    task: str
    image: str
    text: str
    label: YesNo
    place: int
    """In its task, from 0."""

    @property
    def question_id(self) -> str:
        return f"{self.task}/{self.place}"


def check(question: Question, response: str) -> CheckedResponse[Question]:
    """A response next to its question, and what is read in it."""
    return CheckedResponse(question=question, response=response, said=parse_response(response))


def read_responses(folder: Path, tasks: Sequence[str]) -> list[CheckedResponse[Question]]:
    """Responses as the authors' tool takes them: `TASK.txt`, a line of image, question, truth and
    response with tabs between, the two questions of an image after each other.

    Raises:
        DataError: a task has no file, a line has another form, or an image has one question.
    """
    checked = []
    for path, question, rest in _lines_of(folder, tasks):
        if len(rest) != 1:
            raise DataError(
                f"{path}: line {question.place + 1} has {3 + len(rest)} fields, and needs image, "
                f"question, truth and response with tabs between"
            )
        checked.append(check(question, rest[0]))
    return checked


def read_questions(folder: Path, tasks: Sequence[str]) -> list[Question]:
    """The questions: of `TASK.txt` as above, whose responses are not read; or as published, a
    folder `TASK` with a file of two lines of question and truth for each image.

    Raises:
        DataError: see `read_responses`.
    """
    single = [task for task in tasks if (folder / f"{task}.txt").is_file()]
    found = [question for _, question, _ in _lines_of(folder, single)]
    return [*found, *(q for task in tasks if task not in single for q in _published(folder, task))]


def _lines_of(
    folder: Path, tasks: Sequence[str]
) -> Iterable[tuple[Path, Question, tuple[str, ...]]]:
    for task in tasks:
        path = folder / f"{task}.txt"
        text = read_text(path, absent=f"there is no file of the task {task}")
        rows = [line.split("\t") for line in text.split("\n") if line.strip()]
        short = next((n for n, row in enumerate(rows, start=1) if len(row) < 3), None)
        if short is not None:
            raise DataError(
                f"{path}: line {short} has {len(rows[short - 1])} fields, and needs image, "
                f"question, truth and response with tabs between"
            )
        questions = [_question(task, n, row[0], row[1], row[2], path) for n, row in enumerate(rows)]
        refuse_unpaired(questions, path)
        yield from zip([path] * len(rows), questions, (tuple(r[3:]) for r in rows), strict=True)


def _published(folder: Path, task: str) -> list[Question]:
    place = folder / task
    texts = place / "questions_answers_YN"
    files = sorted((texts if texts.is_dir() else place).glob("*.txt"))
    if not files:
        raise DataError(
            f"{folder}: has no questions of the task {task}: neither {task}.txt, nor a folder "
            f"{task} with a .txt for each image"
        )
    images = place / "images" if (place / "images").is_dir() else place
    questions: list[Question] = []
    for path in files:
        rows = [line.split("\t") for line in read_text(path).split("\n") if line.strip()]
        if len(rows) != 2 or any(len(row) != 2 for row in rows):
            raise DataError(f"{path}: needs two lines of question and truth, with a tab between")
        names = [path.stem + ending for ending in _IMAGES]
        image = next((name for name in names if (images / name).is_file()), names[0])
        for text, label in rows:
            questions.append(_question(task, len(questions), image, text, label, path))
    return questions


def _question(task: str, place: int, image: str, text: str, label: str, path: Path) -> Question:
    read = label.strip().lower()
    if read not in ("yes", "no"):
        raise DataError(
            f"{path}: line {place + 1}: the truth must be Yes or No, got {shortly(label)}"
        )
    said: YesNo = "yes" if read == "yes" else "no"
    return Question(task=task, image=image, text=text, label=said, place=place)


def refuse_unpaired(questions: Sequence[Question], path: Path) -> None:
    """Raise DataError unless lines 1 and 2, 3 and 4, ... are about one image each."""
    for first in range(0, len(questions), 2):
        pair = questions[first : first + 2]
        if len({question.image for question in pair}) > 1 or len(pair) < 2:
            named = " and ".join(question.image for question in pair)
            raise DataError(
                f"{path}: lines {first + 1} and {first + 2} must be the two questions of an image, "
                f"and are about {named}{'' if len(pair) > 1 else ' alone'}; a line that is missing "
                f"or too many shifts all pairs behind it"
            )


COUNTS = (
    "questions",
    "right",
    "images",
    "both_right",
    "true_positives",
    "false_positives",
    "true_negatives",
    "false_negatives",
    "neither_yes_nor_no",
    "words",
)


def tally(checked: Sequence[CheckedResponse[Question]], images: Sequence[str]) -> Tally:
    """Counts of the responses of one task, shape [images], by the names of `COUNTS`.

    Args:
        checked: the two of an image after each other.
        images: the clusters; every image of the responses is one of them.
    """
    places = {image: place for place, image in enumerate(images)}
    counts = np.zeros((len(COUNTS), len(places)))
    for n, item in enumerate(checked):
        label, said = item.question.label, item.said
        pair = checked[n - n % 2 : n - n % 2 + 2]
        counts[:, places[item.question.image]] += (
            1,
            item.is_right,
            n % 2,
            n % 2 and all(one.is_right for one in pair),
            said == "yes" and label == "yes",
            said == "yes" and label == "no",
            said == "no" and label == "no",
            said == "no" and label == "yes",
            said is None,
            len(item.response.split()),
        )
    return dict(zip(COUNTS, counts, strict=True))


MEASURES: Mapping[str, Measure] = {
    "accuracy": Measure("accuracy", "percent", lambda t: 100 * ratio(t["right"], t["questions"])),
    "accuracy_plus": Measure(
        "accuracy+, both questions of an image right",
        "percent",
        lambda t: 100 * ratio(t["both_right"], t["images"]),
    ),
    "score": Measure(
        "score, the sum of both",
        "points",
        lambda t: 100 * (ratio(t["right"], t["questions"]) + ratio(t["both_right"], t["images"])),
    ),
    "precision": Measure(
        "precision (yes is positive)",
        "percent",
        lambda t: 100 * ratio(t["true_positives"], t["true_positives"] + t["false_positives"]),
    ),
    "recall": Measure(
        "recall, of those read",
        "percent",
        lambda t: 100 * ratio(t["true_positives"], t["true_positives"] + t["false_negatives"]),
    ),
    "neither_ratio": Measure(
        "neither yes nor no (count as wrong)",
        "percent",
        lambda t: 100 * ratio(t["neither_yes_nor_no"], t["questions"]),
    ),
    "mean_length": Measure(
        "mean length in words", "words", lambda t: ratio(t["words"], t["questions"])
    ),
}
