"""The playground's truth as a reward: what is right, complete, and named once."""

from __future__ import annotations

import io

import pytest

from diffalign.data.responses.questions import Question
from diffalign.data.responses.records import IMAGE, Turn
from diffalign.playground.multi_object_scenes import (
    description,
    kinds_in,
    sample_multi_object_scene,
    sentence,
)
from diffalign.playground.questions import DESCRIBE, absent_kinds, existence_question
from diffalign.playground.scenes import render
from diffalign.playground.truth import PlaygroundTruth


def about(seed, text):
    scene = sample_multi_object_scene((7, seed))
    stream = io.BytesIO()
    render(scene).save(stream, "png")
    turns = (Turn(role="user", text=f"{IMAGE}\n{text}"),)
    return scene, Question(sample_id="q", images=(stream.getvalue(),), turns=turns, response=None)


@pytest.mark.parametrize("seed", range(12))
def test_the_truth_earns_most_and_each_fault_costs(seed):
    scene, question = about(seed, DESCRIBE)
    reward, kinds = PlaygroundTruth(), list(kinds_in(scene))
    absent = absent_kinds(scene, "random", seed=0)[0]
    right, missed, added, twice, silent = reward.score(
        question,
        [
            description(kinds),
            description(kinds[1:]),
            description([*kinds, absent]),
            description([*kinds[1:], kinds[1]]),
            "I see things.",
        ],
    )
    count = len(kinds)
    assert right == 1
    assert missed == pytest.approx((1 + (count - 1) / count) / 2)
    assert added == pytest.approx((count / (count + 1) + 1) / 2)
    assert twice == pytest.approx(((count - 1) / count + (count - 1) / count) / 2)
    assert silent == 0


@pytest.mark.parametrize("seed", range(6))
def test_yes_or_no_is_read_off_the_image(seed):
    scene, _ = about(seed, DESCRIBE)
    for kind, right in (
        (kinds_in(scene)[0], "Yes."),
        (absent_kinds(scene, "popular", 0)[0], "No."),
    ):
        _, question = about(seed, existence_question(kind))
        found = PlaygroundTruth().score(question, ["Yes.", "No.", sentence(kind)])
        assert found == [right == "Yes.", right == "No.", False]


def test_other_questions_cannot_be_scored():
    _, question = about(0, "Why?")
    assert PlaygroundTruth().obstacle(question) == "it is no question of the playground: 'Why?'"
    assert PlaygroundTruth().obstacle(about(0, DESCRIBE)[1]) is None
