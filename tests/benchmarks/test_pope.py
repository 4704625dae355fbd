"""POPE: parsing and figures worked by hand, and the published questions."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from diffalign.benchmarks.pope.rules import (
    MEASURES,
    CheckedResponse,
    Question,
    read_questions,
    read_responses,
    tally,
)
from diffalign.errors import DataError
from diffalign.response_rules.yes_no import parse_response, says
from tests.benchmarks.shared_data import shared_folder

RESPONSES = (
    "Yes, there is a dog.",
    "No",
    "no, I cannot see.",
    "There is not a cat in the image",
    "It does not. Yes",
    "Nothing here",
    "yes",
    "Yes. no",
)
PARSED = ["yes", "no", "no", "no", "no", "yes", "yes", "yes"]
LABELS = ["yes", "no", "no", "yes", "no", "no", "yes", "no"]


@pytest.mark.parametrize(("response", "parsed"), list(zip(RESPONSES, PARSED, strict=True)))
def test_responses_are_parsed_as_published(response, parsed):
    assert parse_response(response) == parsed


@pytest.mark.parametrize("response", ["NO", "Not at all", "none", "Maybe", "", ". no"])
def test_whatever_is_no_spelt_no_is_a_yes(response):
    assert parse_response(response) == "yes"


SAID = {
    "Yes, a dog.": "yes",
    "No, there is none.": "no",
    "I cannot tell from the image": None,
    "The image shows a street": None,
    "There is NO cat": "no",
    "yes": "yes",
    "YES": "yes",
    "Not sure": "no",
    "Maybe. No": None,
    "nope": None,
    "": None,
    " ": None,
    "There isn't a chair, no": "no",
}


@pytest.mark.parametrize("response", SAID)
def test_what_is_neither_yes_nor_no_is_told_from_both(response):
    assert says(response) == SAID[response]


def test_what_is_neither_is_counted_apart():
    checked = [
        CheckedResponse(question=q, response=a)
        for q, a in zip(questions(["yes", "no"] * 6), list(SAID)[:12], strict=True)
    ]
    counts = {name: int(count.sum()) for name, count in tally(checked, ["0.jpg", "1.jpg"]).items()}
    assert counts["neither_yes_nor_no"] == 6
    assert counts["no_read_as_yes"] == 2
    assert counts["true_negatives"] + counts["false_negatives"] == 1


def questions(labels: list[str]) -> list[Question]:
    return [
        Question(question_id=str(n), image=f"{n % 2}.jpg", text="Is there a dog?", label=label)
        for n, label in enumerate(labels, start=1)
    ]


def values(labels: list[str], responses) -> dict[str, float]:
    asked = questions(labels)
    checked = [
        CheckedResponse(question=q, response=a) for q, a in zip(asked, responses, strict=True)
    ]
    counts = tally(checked, ["0.jpg", "1.jpg"])
    totals = {name: np.asarray(count.sum()) for name, count in counts.items()}
    return {name: float(measure.statistic(totals)) for name, measure in MEASURES.items()}


def test_figures_worked_by_hand():
    figures = values(LABELS, RESPONSES)
    assert figures["mean_length"] == (5 + 1 + 4 + 8 + 4 + 2 + 1 + 2) / 8
    del figures["mean_length"]
    assert figures == pytest.approx(
        {  # TP 2, FP 2, TN 3, FN 1
            "accuracy": 62.5,
            "precision": 50.0,
            "recall": 66.6667,
            "f1": 57.1429,
            "yes_ratio": 50.0,
            "neither_ratio": 12.5,
        },
        abs=1e-4,
    )


PUBLISHED = (
    ("Yes, a dog.", "yes", "yes"),
    ("No, there is none.", "no", "no"),
    ("I cannot tell from the picture", "no", "yes"),
    ("The image shows a street", "yes", "yes"),
    ("There is NO cat", "no", "yes"),
    ("yes", "yes", "yes"),
    ("no", "no", "no"),
    ("Not sure", "no", "yes"),
    ("Maybe. No", "yes", "yes"),
    ("nope", "no", "yes"),
    ("", "yes", "yes"),
    ("There isn't a chair, no", "no", "no"),
)
"""Response, truth, and how the released evaluate.py read it."""


def test_twelve_responses_count_as_the_released_code_counts_them():
    responses, labels, parsed = zip(*PUBLISHED, strict=True)
    assert tuple(map(parse_response, responses)) == parsed
    figures = values(list(labels), responses)
    expected = {  # TP 5, FP 4, TN 3, FN 0
        "accuracy": 66.6666666667,
        "precision": 55.5555555556,
        "recall": 100,
        "f1": 71.4285714286,
        "yes_ratio": 75,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    # Of the nine yeses two have the word; five say neither, and NO and Not are a no.
    assert figures["neither_ratio"] == pytest.approx(100 * 5 / 12)
    asked = questions(list(labels))
    checked = [
        CheckedResponse(question=q, response=r) for q, r in zip(asked, responses, strict=True)
    ]
    counts = tally(checked, ["0.jpg", "1.jpg"])
    assert (counts["neither_yes_nor_no"].sum(), counts["no_read_as_yes"].sum()) == (5, 2)


def test_yes_to_everything_shows_in_the_share_of_yes():
    figures = values(["yes", "no"], ["Yes", "Yes"])
    assert (figures["recall"], figures["precision"], figures["yes_ratio"]) == (100, 50, 100)


def test_no_to_everything_leaves_precision_undefined():
    figures = values(["yes", "no"], ["No", "No"])
    assert np.isnan(figures["precision"])
    assert (figures["recall"], figures["f1"], figures["yes_ratio"]) == (0, 0, 0)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_responses_find_their_questions_by_id(tmp_path):
    asked = questions(["yes", "no", "no"])
    rows = [{"question_id": 3, "answer": "No"}, {"question_id": "1", "text": "Yes"}]
    checked = read_responses(write(tmp_path / "a.jsonl", rows), asked)
    assert [(item.question.question_id, item.response) for item in checked] == [
        ("1", "Yes"),
        ("3", "No"),
    ]


def test_responses_without_ids_are_taken_in_order(tmp_path):
    asked = questions(["yes", "no"])
    rows = [{"question": "?", "answer": "Yes"}, {"question": "?", "answer": "No"}]
    checked = read_responses(write(tmp_path / "a.jsonl", rows), asked)
    assert [item.response for item in checked] == ["Yes", "No"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question_id": 9, "answer": "No"}],
            "1 responses are to questions that are not there.*9",
        ),
        ([{"question_id": 1, "answer": "No"}] * 2, "1 question_ids stand more than once.*1"),
        ([{"answer": "No"}], "1 responses without question_id to 2 questions"),
        ([{"answer": "No"}, {"question_id": 1, "answer": "No"}], "1 of 2 responses have no"),
        ([{"question_id": 1}], "no key answer or response"),
    ],
)
def test_responses_that_cannot_be_placed_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_responses(write(tmp_path / "a.jsonl", rows), questions(["yes", "no"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"label": "maybe"}, "label must be yes or no"), ({"image": None}, "has no image")],
)
def test_questions_that_are_none_are_refused(tmp_path, change, message):
    row = {"question_id": 1, "image": "a.jpg", "text": "?", "label": "yes", **change}
    row = {key: value for key, value in row.items() if value is not None}
    with pytest.raises(DataError, match=message):
        read_questions(write(tmp_path / "q.jsonl", [row]))


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_three_thousand_real_questions_parse(split):
    asked = read_questions(shared_folder("pope") / f"coco_pope_{split}.json")
    assert len(asked) == 3000
    assert Counter(question.label for question in asked) == {"yes": 1500, "no": 1500}
    assert len({question.image for question in asked}) == 500
