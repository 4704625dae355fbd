"""The tiny LLaVA: standard classes, standard folder, one token a word."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from diffalign.data.responses.chat import ChatEncoder
from diffalign.data.responses.records import Turn
from diffalign.errors import DataError, ModelError
from diffalign.models.vlm.config import VLM
from diffalign.playground import models
from diffalign.playground.llava import build_llava, build_processor, build_tokenizer, save_llava
from diffalign.playground.models import playground_llava_path, playground_responses_path
from diffalign.playground.multi_object_scenes import description, sample_multi_object_scene
from diffalign.playground.questions import DESCRIBE, attribute_questions, existence_question
from diffalign.playground.response_quality import evaluate_responses, held_out_multi_object_scenes
from diffalign.playground.scenes import KINDS, render


def test_equal_seeds_give_equal_weights_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    first, second, other = (build_llava(seed).lm_head.weight for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_word_of_an_response_is_one_token_with_its_characters():
    tokenizer = build_tokenizer()
    scenes = [sample_multi_object_scene((2, i)) for i in range(40)]
    attributes = [q for scene in scenes for q in attribute_questions(scene)]
    texts = [description(KINDS), "Yes. No.", *(q.response for q in attributes)]
    texts += [existence_question(kind) for kind in KINDS] + [q.text for q in attributes]
    for text in texts:
        encoded = tokenizer(" " + text, return_offsets_mapping=True, add_special_tokens=False)
        words = [(" " + text)[start:end].strip() for start, end in encoded["offset_mapping"]]
        assert words == text.replace(".", " .").replace("?", " ?").split()
        assert tokenizer.decode(encoded["input_ids"]).strip() == text


def test_any_other_text_is_spelled():
    text = "Zebras — 7 émus\n(and a RED   one)"
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_image_is_sixteen_tokens_in_the_template_of_llava():
    processor = build_processor()
    encoder = ChatEncoder(processor)
    scene = sample_multi_object_scene((2, 0))
    prompt = encoder.prompt([Turn(role="user", text=f"<image>\n{DESCRIBE}")], [render(scene)])
    assert prompt.text == f"USER: <image>\n{DESCRIBE} ASSISTANT:"
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (prompt.input_ids == image).sum() == 16
    response = encoder.response(prompt, "There is a red circle.")
    assert processor.tokenizer.decode(response.tokens) == " There is a red circle.</s>"


def test_a_saved_folder_opens_again_with_the_same_logits(tmp_path):
    model = build_llava(0).eval()
    save_llava(model, tmp_path)
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = AutoProcessor.from_pretrained(tmp_path)(
        text=f"USER: <image>\n{DESCRIBE} ASSISTANT:",
        images=render(sample_multi_object_scene((2, 0))),
        return_tensors="pt",
    )
    with torch.no_grad():
        assert torch.equal(opened(**inputs).logits, model(**inputs).logits)


def test_missing_assets_are_named_with_the_command_that_makes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_assets", lambda: tmp_path)
    with pytest.raises(ModelError, match=r"scripts/pretrain_playground_llava\.py --out"):
        playground_llava_path()
    with pytest.raises(DataError, match=r"scripts/make_playground_responses\.py --out"):
        playground_responses_path()


def test_the_shipped_model_is_small_and_holds_no_pickle():
    files = [path for path in playground_llava_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    assert {path.suffix for path in files} <= {".json", ".jinja", ".md", ".safetensors"}
    model = AutoModelForImageTextToText.from_pretrained(playground_llava_path())
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert model.num_parameters() < 4e6


@pytest.mark.slow
def test_the_shipped_model_sees_well_and_hallucinates_all_the_same():
    model = VLM(path=str(playground_llava_path())).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
    )
    figures = evaluate_responses(model, held_out_multi_object_scenes(100))
    value = {name: figure.value for name, figure in figures.items()}
    assert 25 < value["chair_s"] < 50
    assert value["recall"] > 85 and value["attribute_accuracy"] > 85
    assert value["pope_accuracy"] > 65 and value["pope_yes_ratio"] > 52
    assert value["pope_adversarial_accuracy"] < value["pope_random_accuracy"]
