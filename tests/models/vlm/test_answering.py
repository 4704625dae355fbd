"""Several questions about one image: the responses of one question at a time, from one look."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from PIL.Image import Image

from diffalign.models import lora
from diffalign.models.lora import LoraSettings
from diffalign.models.vlm import answering
from diffalign.models.vlm.answering import Answerer
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.processor import question_prompt
from diffalign.playground.questions import DESCRIBE, existence_question
from diffalign.playground.response_quality import held_out_multi_object_scenes
from diffalign.playground.scenes import KINDS, render
from tests.responses import SIZES, random_image
from tests.tiny_vlm import tiny_llava, tiny_llava_next, tiny_qwen2_5_vl, tiny_qwen2_vl

PLAYGROUND = Path(__file__).parents[3] / "assets/playground/llava"
FAMILIES = {
    "llava": tiny_llava,
    "llava_next": tiny_llava_next,
    "qwen2_vl": tiny_qwen2_vl,
    "qwen2_5_vl": tiny_qwen2_5_vl,
}
QUESTIONS = ("Why?", "What is shown in this image?", "Is it a cat?", "Is it a table? Say it.")


@cache
def folder(family: str) -> str:
    return str(FAMILIES[family](Path(mkdtemp())))


def load(path: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return VLM(path=path, **settings).load(
        device=torch.device("cpu"), compute_dtype=dtype, reference="none", trainable=False
    )


def asked(model: Any, questions: list[tuple[Image, str]], system: str = "") -> dict[str, Any]:
    return {
        "prompts": [question_prompt(model.processor, text, system=system) for _, text in questions],
        "images": [[image] for image, _ in questions],
    }


def tiny_questions() -> list[tuple[Image, str]]:
    """Of four, three, two and one about an image, the images of three sizes."""
    images = [random_image(number, size=SIZES[number % 3]) for number in range(4)]
    return [(image, text) for text in QUESTIONS for image in images[QUESTIONS.index(text) :]]


def one_by_one(model: Any, given: dict[str, Any], length: int) -> list[str]:
    return [
        model.generate([prompt], [shown], max_new_tokens=length)[0]
        for prompt, shown in zip(given["prompts"], given["images"], strict=True)
    ]


SYSTEMS = [(f, s) for f in FAMILIES for s in ("", "Be brief.") if f != "llava_next" or not s]
"""LLaVA-NeXT's template has no system turn."""


@pytest.mark.parametrize(("family", "system"), SYSTEMS)
def test_responses_are_those_of_one_question_at_a_time(family, system):
    model = load(folder(family))
    given = asked(model, tiny_questions(), system)
    expected = one_by_one(model, given, 6)
    looks = []
    model.network.tower.register_forward_pre_hook(lambda *_: looks.append(1))
    answerer = Answerer(model, rows_at_once=3)
    assert answerer.generate(**given, max_new_tokens=6) == expected
    assert len(set(expected)) > 2
    assert not answerer.remarks()
    looks.clear()
    assert answerer.generate(**given, max_new_tokens=6) == expected
    assert len(looks) <= 4  # images, and not the ten questions
    assert answerer.generate(**given, max_new_tokens=1) == one_by_one(model, given, 1)


def test_the_playground_model_says_the_same():
    model = load(str(PLAYGROUND))
    scenes = held_out_multi_object_scenes(3)
    texts = [DESCRIBE, *(existence_question(kind) for kind in KINDS[:5])]
    images = [render(scene) for scene in scenes]
    given = asked(model, [(image, text) for image in images for text in texts])
    expected = one_by_one(model, given, 48)
    said = Answerer(model, rows_at_once=8).generate(**given, max_new_tokens=48)
    assert said == expected
    assert {"Yes.", "No."} < set(said) and max(map(len, said)) > 30


def test_the_roundings_of_half_precision_are_no_difference():
    model = load(folder("qwen2_vl"), torch.bfloat16)
    answerer = Answerer(model, rows_at_once=4)
    given = asked(model, tiny_questions())
    said = answerer.generate(**given, max_new_tokens=6)
    assert not answerer.remarks()
    assert len(said) == 10 and all(said)


def test_a_family_that_differs_in_silence_is_noticed_and_goes_the_plain_way(monkeypatch):
    model = load(folder("llava"))
    given = asked(model, tiny_questions())
    expected = one_by_one(model, given, 6)
    feed = answering.ContinuedRows.feed

    def shifted(self: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self._following = self._following + 1
        return feed(self, ids, mask)

    monkeypatch.setattr(answering.ContinuedRows, "feed", shifted)
    answerer = Answerer(model)
    assert answerer.generate(**given, max_new_tokens=6) == expected
    (remark,) = answerer.remarks()
    assert "images are computed for each question: log-probabilities of tokens differ by" in remark
    assert answerer.generate(**given, max_new_tokens=6) == expected
    assert not answerer.remarks()


def test_an_obstacle_is_said_once_and_a_setting_in_silence(monkeypatch):
    model = load(folder("llava"))
    given = asked(model, tiny_questions())
    monkeypatch.setattr(answering, "PrefixCache", None)
    quiet = Answerer(model, prefix="repeated")
    quiet.generate(**given, max_new_tokens=2)
    assert not quiet.remarks()
    model.network.model.generation_config.no_repeat_ngram_size = 2
    said = Answerer(model)
    said.generate(**given, max_new_tokens=2)
    assert [*said.remarks(), *said.remarks()] == [
        "images are computed for each question: the checkpoint's generation_config sets "
        "no_repeat_ngram_size"
    ]


def with_adapter(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    settings = LoraSettings(rank=2, **changes)
    model = load(folder("llava"), dtype, lora=settings)
    for name, parameter in model.network.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.sin(torch.arange(parameter.numel()) * 1.7).view_as(parameter)
    return model


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.network.state_dict().items()}


def test_an_adapter_is_merged_while_it_answers_and_taken_out_bit_for_bit():
    model = with_adapter()
    given, before = asked(model, tiny_questions()), weights(model)
    expected = one_by_one(model, given, 6)
    assert expected != one_by_one(load(folder("llava")), given, 6)
    layers = lora.adapter_layers(model.network)
    with Answerer(model) as answerer:
        assert answerer.generate(**given, max_new_tokens=6) == expected
        assert not answerer.remarks()
        assert layers and all(layer.merged for layer in layers)
        assert answerer.generate(**given, max_new_tokens=6) == expected
    assert not any(layer.merged for layer in layers)
    after = weights(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert one_by_one(model, given, 6) == expected


def test_only_plain_float32_weights_are_merged():
    for model in (with_adapter(torch.bfloat16), with_adapter(dora=True)):
        with lora.merged(model.network):
            assert not any(layer.merged for layer in lora.adapter_layers(model.network))
    model = with_adapter()
    layers = lora.adapter_layers(model.network)
    with lora.disabled(layers), lora.merged(model.network):
        assert not any(layer.merged for layer in layers)
