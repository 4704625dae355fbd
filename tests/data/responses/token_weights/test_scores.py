import pytest

from diffalign.data.responses.token_weights.scores import Scores
from diffalign.data.skipping import UnusableRowError
from tests.data.responses.token_weights.words import judged, response

BY_SCORE = {"1": 2.5, "2": 2.0, "3": 1.5, "4": 1.0}


def weigh(name, *parts, **settings):
    text, spans = judged(*parts)
    return Scores(**settings).weigh(name, {name: response(text)}, {name: spans}).tolist()


def test_a_sentence_counts_by_its_score_and_the_end_as_the_last_sentence():
    parts = (("a b .", None, 4.0), ("c .", None, 1.0))
    assert weigh("revised", *parts, by_score=BY_SCORE) == [1, 1, 1, 2.5, 2.5, 2.5]


def test_the_end_of_the_models_own_response_counts_nothing():
    assert weigh("rejected", ("a .", None, 2.0), by_score=BY_SCORE) == [2, 2, 0]
    parts = ("a .", None, 2.0)
    assert weigh("rejected", parts, by_score=BY_SCORE, open_ended=()) == [2, 2, 2]


def test_a_mistake_of_recognition_counts_by_its_label():
    table = {"image_recognition_error": 3.0}
    parts = (("a .", "image_recognition_error", 1.0), ("b", "correct", 4.0), ("c", None, None))
    assert weigh("revised", *parts, by_label=table) == [3, 3, 1, 1, 1]


def test_an_added_sentence_that_has_no_score_counts_once():
    text, spans = judged(("a .", None, 1.0))
    weights = Scores(by_score=BY_SCORE).weigh(
        "revised", {"revised": response(text + " b .")}, {"revised": spans}
    )
    assert weights.tolist() == [2.5, 2.5, 1, 1, 1]


def test_a_row_without_scores_is_dropped():
    with pytest.raises(UnusableRowError, match="says nothing about parts"):
        Scores(by_score=BY_SCORE).weigh("revised", {"revised": response("a")}, {"revised": ()})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of by_score and by_label"),
        ({"by_score": BY_SCORE, "by_label": {"a": 1.0}}, "one of by_score and by_label"),
        ({"by_score": {"1": -1.0}}, "not be negative"),
        ({"by_score": {"good": 1.0}}, "whole numbers, got good"),
    ],
)
def test_tables_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Scores(**settings)
