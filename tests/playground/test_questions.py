"""Questions about multi-object scenes, and the responses that are right."""

from __future__ import annotations

import pytest

from diffalign.playground.multi_object_scenes import COMPANIONS, kinds_in, sample_multi_object_scene
from diffalign.playground.questions import (
    SPLITS,
    absent_kinds,
    attribute_named,
    attribute_questions,
    existence_question,
)
from diffalign.playground.scenes import Kind, Object, Scene


def scene_of(*kinds: Kind) -> Scene:
    objects = tuple(Object(kind, 16.0, 16.0, 10.0) for kind in kinds)
    return Scene(objects, (240, 240, 240))


RED_CIRCLE, RED_SQUARE, BLUE_SQUARE = (
    Kind("red", "circle"),
    Kind("red", "square"),
    Kind("blue", "square"),
)


def test_only_questions_with_one_response_are_asked():
    asked = {q.text: q.attribute for q in attribute_questions(scene_of(RED_CIRCLE, RED_SQUARE))}
    assert asked == {"What colour is the circle?": "red", "What colour is the square?": "red"}
    asked = {q.text: q.attribute for q in attribute_questions(scene_of(RED_SQUARE, BLUE_SQUARE))}
    assert asked == {
        "What shape is the red object?": "square",
        "What shape is the blue object?": "square",
    }


def test_the_right_responses_name_the_attribute_that_is_asked_for():
    questions = list(attribute_questions(scene_of(RED_CIRCLE, BLUE_SQUARE)))
    assert len(questions) == 4
    for question in questions:
        assert attribute_named(question.response, question) == question.attribute


@pytest.mark.parametrize(
    ("response", "read"), [("The circle is Blue.", "blue"), ("red", "red"), ("A circle.", None)]
)
def test_the_first_word_of_the_right_sort_is_the_response(response, read):
    question = next(attribute_questions(scene_of(RED_CIRCLE, BLUE_SQUARE)))
    assert question.text == "What colour is the circle?"
    assert attribute_named(response, question) == read


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_asks_for_as_many_absent_kinds_as_are_present(split):
    for i in range(30):
        scene = sample_multi_object_scene((1, i))
        absent = absent_kinds(scene, split, seed=i)
        assert len(set(absent)) == len(absent) == len(scene.objects)
        assert not set(absent) & set(kinds_in(scene))
        assert absent_kinds(scene, split, seed=i) == absent


def test_the_adversarial_split_asks_for_the_companions_of_what_is_there():
    for trigger, companion in COMPANIONS.items():
        other = next(k for k in COMPANIONS if k != trigger)
        assert absent_kinds(scene_of(trigger, other), "adversarial", 0)[0] == companion


def test_the_popular_split_asks_for_companions_since_they_are_seen_most():
    assert set(absent_kinds(scene_of(RED_CIRCLE, BLUE_SQUARE), "popular", 0)) <= set(
        COMPANIONS.values()
    )


def test_existence_is_asked_in_the_words_of_pope():
    assert existence_question(RED_CIRCLE) == "Is there a red circle in the picture?"
