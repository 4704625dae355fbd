"""Responses filled in again, looking at the nearest other images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffalign.errors import DataError
from diffalign.synthesis import re_align as re_align
from diffalign.synthesis.base import Made
from diffalign.synthesis.phrases import PhraseConfig
from diffalign.synthesis.re_align import RetrieveAndFill
from diffalign.synthesis.similarity import SimilarityConfig, embed
from tests.responses import random_image
from tests.synthesis.contexts import RESPONSES, context, make, model, question


def method(**settings):
    defaults = {
        "max_new_tokens": 5,
        "phrases": PhraseConfig(kind="words"),
        "similarity": SimilarityConfig(kind="language_model"),
    }
    return RetrieveAndFill(**{**defaults, **settings})


def test_the_nearest_other_image_is_shown_first_and_becomes_the_retrieved_one(tmp_path):
    made = make(method(accept_below=2.0), tmp_path)
    images = [random_image(n, size=(20 + 4 * n, 16)) for n in range(4)]
    vectors = embed(model(), images, pooling="mean")
    cosines = torch.cosine_similarity(vectors[:, None], vectors[None], dim=2)
    nearest = (cosines - 3 * torch.eye(4)).argmax(dim=1).tolist()
    assert [some.values["retrieved_image"] for some in made] == [f"{n}.png" for n in nearest]
    assert [some.values["image"] for some in made] == [f"{n}.png" for n in range(4)]
    first = made[0].values
    assert first["masked"] == "A [MASK] here. It is [MASK] and [MASK]."
    assert first["chosen"][-1] == {"role": "assistant", "content": RESPONSES[0]}
    assert first["chosen"][0] == first["rejected"][0] != first["rejected"][-1]
    assert (first["masked_by"], first["neighbour"]) == ("runs of content words", 1)


def test_the_next_neighbours_are_tried_and_then_the_question_is_dropped(tmp_path, monkeypatch):
    made = make(method(accept_below=-2.0, neighbours=9), tmp_path)
    assert {some.reason for some in made} == {"no neighbour gave a response that differs enough"}
    cosines = iter([1.0, 0.5])
    constant = SimilarityConfig(kind="language_model")
    monkeypatch.setattr(
        SimilarityConfig, "open", lambda *_: lambda a, b: torch.full((len(a),), next(cosines))
    )
    later = make(method(similarity=constant), tmp_path)
    assert [some.values["neighbour"] for some in later] == [2] * 4


def test_the_image_that_is_shown_is_the_neighbour_of_that_rank(tmp_path, monkeypatch):
    work = context(tmp_path, questions := [question(number, tmp_path) for number in range(3)])
    shown = []
    prompt = work.writer.prompt
    monkeypatch.setattr(
        work.writer, "prompt", lambda turns, images: shown.append(images) or prompt(turns, images)
    )
    method(accept_below=-2.0).open(work)(questions[:1])
    widths = [image.width for (image,) in shown]
    assert sorted(widths) == [24, 28]  # those of the other two questions


def test_features_are_computed_once(tmp_path, monkeypatch):
    before = make(method(), tmp_path)

    def refuse(*_, **__):
        raise AssertionError("the images were looked at again")

    monkeypatch.setattr(re_align, "embed", refuse)
    assert make(method(), tmp_path) == before
    with pytest.raises(AssertionError, match="looked at again"):
        make(method(pooling="cls"), tmp_path)


def test_questions_without_anything_to_mask_or_with_a_bad_image_are_left_out(tmp_path):
    questions = [question(number, tmp_path) for number in range(3)]
    questions[1] = replace(questions[1], response="Yes.")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    questions.append(replace(questions[2], sample_id="bad", images=(bad,)))
    questions.append(replace(questions[2], sample_id="gone", images=(tmp_path / "gone.png",)))
    questions.append(replace(questions[2], sample_id="none", images=()))
    made = method(accept_below=2.0).open(context(tmp_path, questions))(questions)
    assert [isinstance(some, Made) for some in made] == [True, False, True, False, False, False]
    assert [some.reason for some in made[3:]] == [
        "corrupt image",
        "missing image",
        "not one question about one image",
    ]
    assert made[1].reason == "nothing to mask"


def test_one_image_alone_has_no_neighbour(tmp_path):
    with pytest.raises(DataError, match="needs other images"):
        make(method(), tmp_path, count=1)


def test_qwen_retrieves_too(tmp_path):
    assert all(isinstance(some, Made) for some in make(method(), tmp_path, family="qwen2_vl"))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"instruction": "Fill {blanks}"}, "wants 'blanks'"),
        ({"instruction": "Fill"}, "must have {masked}"),
        ({"mask_share": 0.0}, "above 0"),
        ({"neighbours": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        method(**settings)
