"""The shipped preferences between responses are what their description says, in every form."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.reading import OpenedResponses, open_responses
from diffalign.data.responses.records import IMAGE, ResponsePair
from diffalign.playground.models import playground_responses_path
from diffalign.playground.multi_object_scenes import kind_named, sentences_of
from diffalign.playground.oracle import read_objects
from diffalign.playground.questions import DESCRIBE
from diffalign.playground.scenes import Kind

KINDS = ("trl", "rlhf_v", "mask_dpo", "opa_dpo", "re_align")


def opened(kind: str) -> OpenedResponses:
    return open_responses(ResponseConfig(path=str(playground_responses_path()), kind=kind))


def pairs(kind: str, count: int = 60) -> list[ResponsePair]:
    data = opened(kind)
    found = [data.pair(number, 0) for number in range(count)]
    assert all(isinstance(pair, ResponsePair) for pair in found)
    return found


def shown(image) -> set[Kind]:
    return {item.kind for item in read_objects(Image.open(io.BytesIO(image)))}


def named(response: str) -> list[Kind | None]:
    return [kind_named(text) for text in sentences_of(response)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_usable_in_every_form(kind):
    data = opened(kind)
    found = [comparison for row in data.without_images() for comparison in row]
    assert len(found) == len(data.rows) == 1000
    for comparison in found:
        assert comparison.turns[-1].text.replace(IMAGE, "").strip() == DESCRIBE
    first = data.pair(0, 0)
    assert sum(turn.text.count(IMAGE) for turn in first.turns) == len(first.images) == 1


def test_chosen_responses_are_true_and_rejected_ones_are_not():
    for pair in pairs("trl"):
        objects = shown(pair.images[0])
        assert set(named(pair.responses["chosen"])) == objects
        assert not set(named(pair.responses["rejected"])) <= objects


def test_revised_responses_are_right_as_far_as_they_go():
    additions = 0
    for pair in pairs("opa_dpo"):
        objects = shown(pair.images[0])
        assert set(named(pair.responses["revised"])) <= objects
        additions += set(named(pair.responses["chosen"])) != set(named(pair.responses["revised"]))
        assert len(named(pair.responses["revised"])) <= len(named(pair.responses["rejected"]))
    assert additions > 0


def test_labels_and_scores_of_sentences_agree_with_the_image():
    for pair in pairs("mask_dpo"):
        objects = shown(pair.images[0])
        for side, response in pair.responses.items():
            for span in pair.spans[side]:
                right = kind_named(response[span.start : span.end]) in objects
                assert (span.label == "no_hallucination") == right
    for pair in pairs("opa_dpo"):
        objects = shown(pair.images[0])
        for span in pair.spans["rejected"]:
            right = kind_named(pair.responses["rejected"][span.start : span.end]) in objects
            assert (span.score, span.label) in (
                {(4.0, "correct")}
                if right
                else {(1.0, "image_recognition_error"), (2.0, "image_recognition_error")}
            )


def test_retrieved_images_show_other_objects_and_often_some_of_the_same():
    shared = 0
    for pair in pairs("re_align"):
        here, there = shown(pair.images[0]), shown(pair.other_images["retrieved"][0])
        assert here != there
        shared += bool(here & there)
    assert shared > 40


def test_the_file_is_small():
    files = list(playground_responses_path().iterdir())
    assert {path.suffix for path in files} == {".md", ".parquet"}
    assert sum(path.stat().st_size for path in files) < 2e6
