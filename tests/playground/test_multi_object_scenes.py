"""Multi-object scenes: which kinds come together, and what annotators say of them."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.playground.multi_object_scenes import (
    COMPANIONS,
    EXPECTED_COLOURS,
    FEWEST,
    MOST,
    AnnotatorNoise,
    description,
    kind_named,
    kinds_in,
    named,
    sample_multi_object_scene,
    sentences_of,
    truthful_order,
)
from diffalign.playground.oracle import read_objects
from diffalign.playground.scenes import IMAGE_SIZE, KINDS, Kind, render

RED_CIRCLE, GREEN_CROSS = Kind("red", "circle"), Kind("green", "cross")
BLUE_SQUARE, BLACK_CROSS = Kind("blue", "square"), Kind("black", "cross")
CROWDS = [sample_multi_object_scene((0, i)) for i in range(200)]


def annotated(kinds: tuple[Kind, ...], **habits: float) -> tuple[Kind, ...]:
    annotator_noise = AnnotatorNoise(**{"companions": 0.0, "colours": 0.0, **habits})
    return named(kinds, annotator_noise, np.random.default_rng(0))


def test_equal_seeds_give_equal_scenes():
    assert (
        sample_multi_object_scene((3, 1))
        == sample_multi_object_scene((3, 1))
        != sample_multi_object_scene((3, 2))
    )


def test_scenes_hold_two_to_four_different_kinds_within_the_image():
    for scene in CROWDS:
        kinds = kinds_in(scene)
        assert FEWEST <= len(kinds) == len(set(kinds)) <= MOST
        for item in scene.objects:
            centre = np.array([item.x, item.y])
            assert (centre > item.radius).all() and (centre < IMAGE_SIZE - item.radius).all()
    assert {len(scene.objects) for scene in CROWDS} == {2, 3, 4}


def test_the_oracle_reads_what_a_multi_object_scene_shows():
    for scene in CROWDS[:50]:
        seen = [item.kind for item in read_objects(render(scene))]
        assert sorted(seen) == sorted(kinds_in(scene))


def test_companions_are_seen_with_their_triggers_far_more_often_than_others_are():
    with_trigger = [
        (COMPANIONS[kind] in kinds_in(scene))
        for scene in CROWDS
        for kind in kinds_in(scene)
        if kind in COMPANIONS
    ]
    assert 0.3 < np.mean(with_trigger) < 0.55


def test_no_kind_plays_two_parts():
    parts = [*COMPANIONS, *COMPANIONS.values(), *EXPECTED_COLOURS]
    assert len(set(parts)) == len(parts) and set(parts) < set(KINDS)


def test_a_companion_is_named_after_its_trigger_wherever_it_is():
    assert truthful_order((GREEN_CROSS, BLUE_SQUARE, RED_CIRCLE)) == (
        BLUE_SQUARE,
        RED_CIRCLE,
        GREEN_CROSS,
    )


def test_a_companion_without_its_trigger_keeps_its_place():
    assert truthful_order((GREEN_CROSS, BLUE_SQUARE)) == (GREEN_CROSS, BLUE_SQUARE)


def test_truthful_annotators_name_what_is_there_and_nothing_else():
    for scene in CROWDS:
        assert sorted(truthful_order(kinds_in(scene))) == sorted(kinds_in(scene))


def test_annotator_noise_annotators_name_companions_that_are_absent():
    assert annotated((RED_CIRCLE, BLUE_SQUARE), companions=1.0) == (
        RED_CIRCLE,
        GREEN_CROSS,
        BLUE_SQUARE,
    )


def test_annotator_noise_annotators_give_objects_the_colour_that_they_expect():
    assert annotated((BLACK_CROSS, BLUE_SQUARE), colours=1.0) == (
        Kind("red", "cross"),
        BLUE_SQUARE,
    )


def test_nothing_is_named_twice_even_by_mistake():
    kinds = (BLACK_CROSS, Kind("red", "cross"))
    assert annotated(kinds, colours=1.0) == (Kind("red", "cross"),)


def test_descriptions_are_read_back_sentence_by_sentence():
    kinds = (RED_CIRCLE, BLUE_SQUARE)
    text = description(kinds)
    assert text == "There is a red circle. There is a blue square."
    assert tuple(map(kind_named, sentences_of(text))) == kinds


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("There is a red circle. There is", ["There is a red circle.", "There is"]),
        (" Yes. ", ["Yes."]),
        ("", []),
    ],
)
def test_unfinished_responses_have_sentences_too(text, sentences):
    assert sentences_of(text) == sentences


@pytest.mark.parametrize(
    "text", ["Yes.", "There is a circle.", "There is a red circle there.", "There is"]
)
def test_other_sentences_name_no_object(text):
    assert kind_named(text) is None
