"""The exact measures, on responses whose mistakes are known."""

from __future__ import annotations

import re

import pytest
from PIL.Image import Image

from diffalign.intervals import Bootstrap
from diffalign.playground.multi_object_scenes import description, kind_named, kinds_in
from diffalign.playground.questions import DESCRIBE, SPLITS, attribute_questions
from diffalign.playground.response_quality import (
    EXACT_NAMES,
    evaluate_responses,
    held_out_multi_object_scenes,
)
from diffalign.playground.scenes import KINDS, render

SCENES = held_out_multi_object_scenes(12)
FEW = Bootstrap(resamples=100)


class Template:
    """A processor that only writes conversations."""

    def apply_chat_template(self, messages, **_):
        (message,) = messages
        return "".join(part.get("text", "<image>") for part in message["content"])


class Witness:
    """Responses truthfully, but for what a test wants wrong."""

    processor = Template()

    def __init__(self, *, adds: int = 0, leaves_out: int = 0, agrees: bool = False) -> None:
        self.adds, self.leaves_out, self.agrees = adds, leaves_out, agrees
        self.asked: list[str] = []

    def generate(self, prompts, images, *, max_new_tokens):
        scenes = {render(scene).tobytes(): scene for scene in SCENES}
        found = []
        for prompt, (image,) in zip(prompts, images, strict=True):
            assert isinstance(image, Image)
            question = prompt.removeprefix("<image>")
            self.asked.append(question)
            found.append(self._response(question, scenes[image.tobytes()]))
        return found

    def _response(self, question, scene):
        kinds = kinds_in(scene)
        if question == DESCRIBE:
            absent = [kind for kind in KINDS if kind not in kinds]
            return description([*kinds[self.leaves_out :], *absent[: self.adds]])
        if match := re.fullmatch(r"Is there (.*) in the picture\?", question):
            there = kind_named(f"There is {match[1]}.") in kinds
            return "Yes." if there or self.agrees else "No."
        (response,) = (q.response for q in attribute_questions(scene) if q.text == question)
        return response


def values(witness: Witness) -> dict[str, float | None]:
    figures = evaluate_responses(witness, SCENES, bootstrap=FEW)
    return {name: figure.value for name, figure in figures.items()}


def test_the_truth_has_no_hallucination_and_misses_nothing():
    figures = values(Witness())
    assert (figures["chair_s"], figures["chair_i"], figures["recall"]) == (0, 0, 100)
    assert figures["pope_accuracy"] == figures["pope_f1"] == figures["attribute_accuracy"] == 100
    assert figures["pope_yes_ratio"] == 50
    assert figures["mean_length"] == pytest.approx(
        5 * sum(len(scene.objects) for scene in SCENES) / len(SCENES)
    )


def test_one_absent_object_a_description_makes_every_description_hallucinate():
    figures = values(Witness(adds=1))
    objects = sum(len(scene.objects) for scene in SCENES)
    assert (figures["chair_s"], figures["recall"]) == (100, 100)
    assert figures["chair_i"] == pytest.approx(100 * len(SCENES) / (objects + len(SCENES)))


def test_what_is_left_out_costs_recall_alone():
    figures = values(Witness(leaves_out=1))
    objects = sum(len(scene.objects) for scene in SCENES)
    assert figures["chair_s"] == 0
    assert figures["recall"] == pytest.approx(100 * (objects - len(SCENES)) / objects)


def test_who_always_agrees_is_right_half_of_the_time_in_every_split():
    figures = values(Witness(agrees=True))
    assert figures["pope_yes_ratio"] == 100
    assert [figures[f"pope_{split}_accuracy"] for split in SPLITS] == [50, 50, 50]


def test_rates_have_intervals_and_no_question_is_asked_twice_of_a_image():
    witness = Witness(adds=1, agrees=True)
    figures = evaluate_responses(witness, SCENES, bootstrap=FEW)
    low, high = figures["chair_i"].interval
    assert low < figures["chair_i"].value < high
    objects = sum(len(scene.objects) for scene in SCENES)
    existence = [question for question in witness.asked if question.startswith("Is there")]
    assert objects < len(existence) < 4 * objects  # one set of positives, three of negatives


def test_names_of_two_words_are_found_as_they_stand():
    text = "There is a red cross. A black circle and a Blue square, but no green thing, nor a cross"
    assert EXACT_NAMES(text) == ["red cross", "black circle", "blue square"]
