"""Multiple choice about images, as MMStar has it: one letter of a few is right.

*Oddities of the published rule, `letter`, which are kept:* the letter has to stand first, alone or
behind `(`, `option ` or `the answer is `, in any case; every other response is wrong. So `A cat is
there` is an A, and `I think B` is nothing. `text` reads more: the one letter that stands by itself,
or else the one option whose text is in the response; it is not the published rule.

Source: Chen et al. 2024, MMStar, arXiv:2403.20330; `letter` as in their released evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffalign.benchmarks.closed_questions import CheckedResponse
from diffalign.benchmarks.report import Measure
from diffalign.benchmarks.saved_responses import read_table, refuse_repeated
from diffalign.errors import DataError
from diffalign.intervals import Tally, ratio
from diffalign.parsing import shortly

Reading = Literal["letter", "text", "likelihood"]
LETTERS = "ABCDEFGH"
ID_KEYS = ("question_id", "index", "id")
"""Names of a question's id; the first that a row has is taken."""
_OPTION = re.compile(
    r"(?:^|(?<=[\s,;(]))([A-H])\s*[:.)]\s+(.*?)(?=(?:[,;]?\s+\(?[A-H]\s*[:.)]\s)|$)", re.S
)
_BEFORE = ("(", "option ", "the answer is ")


def options_in(question: str) -> dict[str, str]:
    """The options that a question lists itself, as in `Options: A: one, B: two`, by letter."""
    _, listed, options = question.rpartition("Options:")
    if not listed:
        return {}
    found = {letter: text.strip().strip(",") for letter, text in _OPTION.findall(options.strip())}
    return found if list(found) == list(LETTERS[: len(found)]) else {}


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its options."""

    question_id: str
    image: str
    """The name of its file; that of the id where the published file says none."""
    text: str
    """With the options."""
    options: Mapping[str, str]
    """Letter -> text."""
    label: str
    """The right letter."""
    category: str


def read_letter(response: str) -> str | None:
    """The letter of a response by the published rule; None where it begins otherwise."""
    text = response.lower().strip().replace("\n", " ")
    for start in ("", *_BEFORE):
        letter = text[len(start) : len(start) + 1].upper()
        if text.startswith(start) and letter and letter in LETTERS:
            return letter
    return None


def read_text_of(response: str, options: Mapping[str, str]) -> str | None:
    """The one letter that stands by itself in a response, else the one option that it names."""
    letters = set(re.findall(rf"(?<![\w'])([{''.join(options)}])(?![\w'])", response))
    if (
        len(letters) > 1
        and "A" in letters
        and not re.search(r"(?<!\w)A(?=\s*([.,:;)]|$))", response)
    ):
        letters.discard("A")  # an article
    if len(letters) == 1:
        return str(letters.pop())
    said = response.lower()
    named = [
        letter
        for letter, text in options.items()
        if text and re.search(rf"(?<!\w){re.escape(text.lower())}(?!\w)", said)
    ]
    return named[0] if len(named) == 1 else None


def read(response: str, question: Question, how: Reading) -> str | None:
    """The letter of a response; see the module."""
    if how == "text":
        return read_text_of(response, question.options)
    return read_letter(response)


def read_questions(path: Path) -> list[Question]:
    """Questions with `question`, `answer` and options: columns `A`, `B`, ..., a list `options`, or
    in the question itself; JSON lines, a JSON list, TSV, CSV or parquet.

    Raises:
        DataError: a question has no options, or its answer is none of them; an id is twice.
    """
    questions = []
    for number, row in enumerate(read_table(path), start=1):
        where = f"{path}: item {number}"
        missing = [key for key in ("question", "answer") if row.get(key) in (None, "")]
        if missing:
            raise DataError(
                f"{where} has no {', '.join(missing)} (keys: {', '.join(map(str, row))})"
            )
        text = str(row["question"])
        options, listed = _options(row, text)
        if len(options) < 2:
            raise DataError(
                f"{where} has no options: give columns A, B, ..., a list `options`, or write them "
                f"into the question as in 'Options: A: one, B: two'"
            )
        label = str(row["answer"]).strip().strip("().").upper()
        if label not in options:
            raise DataError(
                f"{where}: answer must be one of {', '.join(options)}, got {shortly(row['answer'])}"
            )
        question_id = str(next((row[key] for key in ID_KEYS if key in row), number - 1))
        image = row.get("image")
        named = isinstance(image, str) and len(image) < 256  # longer: the image itself, as text
        questions.append(
            Question(
                question_id=question_id,
                image=str(image) if named else f"{question_id}.jpg",
                text=text if listed else _with_options(text, options),
                options=options,
                label=label,
                category=str(row.get("category") or ""),
            )
        )
    refuse_repeated([question.question_id for question in questions], path)
    return questions


def _options(row: Mapping[str, Any], text: str) -> tuple[dict[str, str], bool]:
    """Options by letter, and whether the question lists them itself."""
    columns = {k: str(row[k]) for k in LETTERS if row.get(k) not in (None, "")}
    if columns:
        return columns, False
    given = row.get("options")
    if isinstance(given, list):
        return dict(zip(LETTERS, map(str, given), strict=False)), False
    return options_in(text), True


def _with_options(text: str, options: Mapping[str, str]) -> str:
    return "\n".join([text, *(f"{letter}. {option}" for letter, option in options.items())])


COUNTS = ("questions", "right", "unread", "chance", "words")


def tally(checked: Sequence[CheckedResponse[Question]], images: Sequence[str]) -> Tally:
    """Counts, shape [images], by the names of `COUNTS`; `chance` is what guessing gets right."""
    places = {image: place for place, image in enumerate(images)}
    counts = np.zeros((len(COUNTS), len(places)))
    for item in checked:
        counts[:, places[item.question.image]] += (
            1,
            item.is_right,
            item.said is None,
            1 / len(item.question.options),
            len(item.response.split()),
        )
    return dict(zip(COUNTS, counts, strict=True))


MEASURES: Mapping[str, Measure] = {
    "accuracy": Measure("accuracy", "percent", lambda t: 100 * ratio(t["right"], t["questions"])),
    "above_chance": Measure(
        "accuracy above guessing",
        "difference",
        lambda t: 100 * ratio(t["right"] - t["chance"], t["questions"]),
    ),
    "unread_ratio": Measure(
        "no letter read (count as wrong)",
        "percent",
        lambda t: 100 * ratio(t["unread"], t["questions"]),
    ),
    "mean_length": Measure(
        "mean length in words", "words", lambda t: ratio(t["words"], t["questions"])
    ),
}
