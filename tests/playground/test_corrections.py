"""Judging descriptions sentence by sentence, on a scene of a red circle and a blue square."""

from __future__ import annotations

import pytest

from diffalign.playground.corrections import check_sentences, hallucinates, revised
from diffalign.playground.multi_object_scenes import description
from diffalign.playground.scenes import Kind, Object, Scene

RED_CIRCLE, BLUE_SQUARE = Kind("red", "circle"), Kind("blue", "square")
SCENE = Scene(
    (Object(RED_CIRCLE, 16.0, 16.0, 10.0), Object(BLUE_SQUARE, 48.0, 16.0, 10.0)), (240, 240, 240)
)


def judged(*kinds: tuple[str, str]):
    found = check_sentences(description(Kind(*kind) for kind in kinds), SCENE)
    assert found is not None
    return found


def test_a_truthful_description_has_no_fault_and_stays_as_it_is():
    sentences = judged(("red", "circle"), ("blue", "square"))
    assert not hallucinates(sentences)
    assert revised(sentences) == "There is a red circle. There is a blue square."


def test_an_absent_object_is_left_out():
    sentences = judged(("red", "circle"), ("green", "cross"), ("blue", "square"))
    assert [item.fault for item in sentences] == ["none", "absent", "none"]
    assert sentences[1].corrected == ""
    assert revised(sentences) == "There is a red circle. There is a blue square."


@pytest.mark.parametrize("kind", [("green", "square"), ("blue", "cross")])
def test_one_wrong_word_is_replaced_where_an_object_would_be_missed(kind):
    sentences = judged(("red", "circle"), kind)
    assert [item.fault for item in sentences] == ["none", "attribute"]
    assert revised(sentences) == "There is a red circle. There is a blue square."


def test_a_wrong_colour_is_more_likely_than_a_wrong_shape():
    sentences = judged(
        ("blue", "circle"),
    )
    assert sentences[0].correction == RED_CIRCLE


def test_an_object_that_is_named_right_elsewhere_is_not_what_a_wrong_sentence_means():
    sentences = judged(("green", "square"), ("blue", "square"))
    assert [item.fault for item in sentences] == ["absent", "none"]


def test_two_wrong_sentences_do_not_mean_the_same_object():
    sentences = judged(("green", "square"), ("black", "square"), ("red", "circle"))
    assert [item.fault for item in sentences] == ["attribute", "absent", "none"]


def test_what_was_missed_is_not_added():
    assert (
        revised(
            judged(
                ("red", "circle"),
            )
        )
        == "There is a red circle."
    )


@pytest.mark.parametrize(
    "response",
    ["There is a red circle. There is a red circle.", "Yes.", "There is a red circle. There is"],
)
def test_repetitions_and_other_sentences_are_not_judged(response):
    assert check_sentences(response, SCENE) is None


def test_a_second_mention_goes_where_repeats_are_judged():
    twice = [("red", "circle"), ("red", "circle"), ("green", "cross"), ("green", "cross")]
    text = description(Kind(*kind) for kind in twice)
    assert check_sentences(text, SCENE) is None
    sentences = check_sentences(text, SCENE, repeats=True)
    assert sentences is not None
    assert [item.fault for item in sentences] == ["none", "repeated", "absent", "absent"]
    assert hallucinates(sentences)
    assert revised(sentences) == "There is a red circle."


def test_a_repeat_alone_is_a_mistake_that_can_be_fixed():
    text = description([RED_CIRCLE, BLUE_SQUARE, RED_CIRCLE])
    sentences = check_sentences(text, SCENE, repeats=True)
    assert sentences is not None and hallucinates(sentences)
    assert revised(sentences) == "There is a red circle. There is a blue square."
