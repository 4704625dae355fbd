"""MMHal-Bench: ratings as published, and figures worked by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffalign.benchmarks.mmhal.rules import (
    MEASURES,
    OWN_TEMPLATE,
    Item,
    RatedItem,
    parse_rating,
    read_items,
    tally,
)
from diffalign.errors import DataError
from diffalign.judges.base import fill


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("It is fine.\nRating: 5, very informative", 5),
        ("RATING: 0", 0),
        ("Rating: 4 ... so rating: 4", 4),
        ("Rating: 4 or rating: 3", None),
        ("Rating: 7", None),
        ("rating 4", None),
        ("", None),
    ],
)
def test_exactly_one_rating_counts(reply, rating):
    assert parse_rating(reply) == rating


def item(place: int, response: str = "a b") -> Item:
    return Item(place=place, contents=("Dog",), question="?", gold="!", response=response)


def test_figures_worked_by_hand():
    counts = tally([RatedItem(item=item(n), rating=r) for n, r in enumerate((6, 3, 2, 0))])
    totals = {name: np.asarray(count.sum()) for name, count in counts.items()}
    values = {name: float(measure.statistic(totals)) for name, measure in MEASURES.items()}
    assert values == pytest.approx(
        {
            "score": 11 / 4,
            "hallucination_rate": 100 * 2 / 4,
            "informativeness": 100 * (3 + 0 + 2 + 0) / 4 / 3,
            "mean_length": 2,
        }
    )


PUBLISHED = (
    ("Good. Rating: 6", 6),
    ("rating: 3, no hallucination", 3),
    ("Rating: 0", 0),
    ("Rating 4", 0),
    ("Rating: 2 at first, but rating: 5", 0),
    ("RATING: 5", 5),
    ("Rating: **4**", 0),
    ("rating: 1 out of 6", 1),
)
"""Replies, and the rating that RLAIF-V's summary makes of them: 0 where it reads none."""


def test_twelve_times_eight_replies_count_as_the_released_code_counts_them():
    rated = [
        RatedItem(item=item(n), rating=parse_rating(PUBLISHED[n % 8][0]) or 0) for n in range(96)
    ]
    assert [r.rating for r in rated[:8]] == [rating for _, rating in PUBLISHED]
    counts = tally(rated)
    totals = {name: np.asarray(count.sum()) for name, count in counts.items()}
    values = {name: float(measure.statistic(totals)) for name, measure in MEASURES.items()}
    assert values["score"] == 1.875
    assert values["hallucination_rate"] == 62.5
    assert values["informativeness"] == pytest.approx(25)
    assert [r.informativeness for r in rated[:8]] == [3, 0, 0, 0, 0, 2, 0, 1]


def test_a_rating_of_ten_reads_as_one_as_published():
    assert parse_rating("Rating: 10") == 1


def test_types_go_round_by_eight():
    assert [item(n).question_type for n in (0, 1, 7, 8, 95)] == [
        "attribute",
        "adversarial",
        "other",
        "attribute",
        "other",
    ]


ROW = {"image_content": ["Dog", "Cat"], "question": "?", "gt_answer": "!", "model_answer": "x"}


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def test_responses_stand_in_the_file_or_next_to_it(tmp_path):
    items = write(tmp_path / "items.json", [ROW])
    (one,) = read_items(items, None)
    assert (one.contents, one.question, one.gold, one.response) == (("Dog", "Cat"), "?", "!", "x")
    responses = write(tmp_path / "answers.json", [{"text": "beside"}])
    (one,) = read_items(items, responses)
    assert one.response == "beside"


@pytest.mark.parametrize(
    ("rows", "responses", "message"),
    [
        ([{**ROW, "model_answer": ""}], None, "1 responses are empty, for example that of item 1"),
        ([ROW], [{"text": "a"}, {"text": "b"}], "2 responses to the 1 questions"),
        ([{**ROW, "image_content": "Dog"}], None, "no list image_content"),
        ([{"question": "?"}], None, "no key model_answer"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, rows, responses, message):
    next_to = None if responses is None else write(tmp_path / "answers.json", responses)
    with pytest.raises(DataError, match=message):
        read_items(write(tmp_path / "items.json", rows), next_to)


def test_templates_take_names_or_the_published_order():
    values = {"contents": "Dog", "question": "Q", "gold": "G", "response": "A {x}"}
    assert fill("{}|{}|{}|{}", **values) == "Dog|Q|G|A {x}"
    assert fill("{response} to {question}", **values) == "A {x} to Q"
    assert "The model's answer: A {x}" in fill(OWN_TEMPLATE, **values)
    with pytest.raises(
        DataError, match=r"filled with contents, question, gold, response .*'image'"
    ):
        fill("{image}", **values)
