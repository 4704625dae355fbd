"""Rewards of responses by hand: right, truthful, complete, and what they cannot read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from diffalign.data.responses.questions import Question
from diffalign.data.responses.records import Turn
from diffalign.errors import DataError
from diffalign.rewards.chair import Chair
from diffalign.rewards.yes_no import YesNo


def question(response=None, images=(Path("COCO_train2014_000000000042.jpg"),)):
    return Question(
        sample_id="q",
        images=images,
        turns=(Turn(role="user", text="<image>\nIs there a dog?"),),
        response=response,
    )


@pytest.mark.parametrize(
    ("truth", "response", "reward"),
    [
        ("yes", "Yes, there is.", 1),
        ("yes", "No.", 0),
        ("no", "There is NO dog", 1),
        ("No.", "no", 1),
        ("no", "It is not there. Yes, a cat", 1),
        ("no", "yes", 0),
        ("yes", "Maybe", 0),
        ("no", "Maybe", 0),
        ("yes", "Yes and no", 0),
        ("no", "Yes and no", 0),
        ("yes", "", 0),
    ],
)
def test_yes_or_no(truth, response, reward):
    assert YesNo().score(question(truth), [response]) == [reward]


def test_denying_what_is_there_may_cost_more_than_affirming_what_is_not():
    reward = YesNo(denied=-2)
    assert reward.score(question("yes"), ["Yes.", "No.", "Maybe"]) == [1, -2, 0]
    assert reward.score(question("no"), ["No.", "Yes."]) == [1, 0]


@pytest.mark.parametrize("truth", [None, "", "a dog"])
def test_a_question_without_yes_or_no_cannot_be_scored(truth):
    assert "says neither yes nor no" in str(YesNo().obstacle(question(truth)))
    assert YesNo().obstacle(question("Yes.")) is None


@pytest.fixture
def chair(tmp_path):
    (tmp_path / "synonyms.txt").write_text("dog, puppy\ncat\nchair, seat\n")
    (tmp_path / "objects.json").write_text(json.dumps({"42": ["dog", "cat"]}))
    return lambda **more: Chair(
        synonyms=tmp_path / "synonyms.txt", objects=tmp_path / "objects.json", **more
    )


@pytest.mark.parametrize(
    ("response", "recall", "reward"),
    [
        ("A dog and a cat.", 1, 1.0),
        ("A puppy.", 1, (1 + 1 / 2) / 2),
        ("A puppy, a dog, a seat.", 1, (1 / 2 + 1 / 2) / 2),
        ("Nothing at all.", 1, (1 + 0) / 2),
        ("Nothing at all.", 0, 1.0),
        ("A seat.", 1, 0.0),
        ("A seat and dogs.", 3, (1 / 2 + 3 * 1 / 2) / 4),
    ],
)
def test_descriptions_are_held_against_the_objects_of_their_image(chair, response, recall, reward):
    assert chair(recall=recall).score(question(), [response]) == [pytest.approx(reward)]


def test_a_second_mention_may_be_wrong(chair):
    twice = "A dog, a cat, a dog and a puppy."
    assert chair().score(question(), [twice]) == [1.0]
    assert chair(repeated="wrong").score(question(), [twice]) == [pytest.approx((2 / 4 + 1) / 2)]


def test_images_that_are_not_known_cannot_be_scored(chair):
    reward = chair()
    assert reward.obstacle(question()) is None
    assert "has no 43" in str(reward.obstacle(question(images=(Path("43.jpg"),))))
    assert "has no name" in str(reward.obstacle(question(images=(b"png",))))
    assert "about 2 images" in str(reward.obstacle(question(images=(Path("42.jpg"),) * 2)))


def test_the_files_of_descriptions_are_read_before_a_run(chair, tmp_path):
    chair().check()
    before = chair().fingerprint
    (tmp_path / "objects.json").write_text(json.dumps({"42": ["dog"]}))
    assert chair().fingerprint != before
    (tmp_path / "objects.json").write_text(json.dumps({"42": ["unicorn"]}))
    with pytest.raises(DataError, match="unicorn is no class of the table"):
        chair().check()
    assert math.isfinite(chair(recall=0).recall)
