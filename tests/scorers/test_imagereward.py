"""On ImageReward's network in small, with random weights under the names of the released file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)
from transformers import AutoTokenizer

from diffalign.errors import ModelError
from diffalign.imaging.image_files import to_images
from diffalign.models.preference.blip_reward import RELEASED
from diffalign.scorers.imagereward import ImageReward
from tests.tiny_rewards import two_images, write_imagereward

PROMPTS = ["a red circle", "the blue square left of a green cross and a red circle"]
TRANSFORM = Compose(
    [
        Resize(32, interpolation=InterpolationMode.BICUBIC),
        CenterCrop(32),
        ToTensor(),
        Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("imagereward")
    write_imagereward(path)
    return path


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def scorer(path: Path, **changes) -> ImageReward:
    return ImageReward(path=str(path), tokenizer=str(path), **changes)


@pytest.mark.parametrize("number", [0, 1])
def test_images_are_prepared_as_by_the_authors(folder, number):
    (image,) = to_images(two_images()[number][None])
    found = scorer(folder).prepare(image)
    assert torch.allclose(found, TRANSFORM(image), rtol=0, atol=1e-6)


def test_the_score_is_the_authors_formula_by_transformers_modules(tmp_path):
    blip, head = write_imagereward(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    found, expected = [], []
    for image in two_images():
        pixels = TRANSFORM(to_images(image[None])[0])[None].expand(2, -1, -1, -1)
        with torch.no_grad():
            seen = blip.vision_model(pixel_values=pixels).last_hidden_state
            read = blip.text_encoder(
                text.input_ids,
                attention_mask=text.attention_mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2]),
            ).last_hidden_state
            raw = head(read[:, 0]).double()
        expected += ((raw[:, 0] - 0.16717362830052426) / 1.0333394966054072).tolist()
        found += scorer(tmp_path).score(image[None].expand(2, -1, -1, -1), PROMPTS).tolist()
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(found) - min(found) > 0.1  # the comparison would also hold for a constant
    assert abs(found[0] - found[2]) > 1e-3 and abs(found[0] - found[1]) > 1e-3


def test_a_score_depends_neither_on_its_company_nor_on_the_batch(folder):
    images = torch.stack([two_images()[0], two_images()[0].flip(0), -two_images()[0]])
    prompts = [*PROMPTS, PROMPTS[0]]
    together = scorer(folder).score(images, prompts)
    apart = scorer(folder, images_per_batch=1).score(images, prompts)
    assert together.tolist() == pytest.approx(apart.tolist(), abs=1e-5)


def test_a_prompt_is_cut_at_35_tokens(folder):
    image = two_images()[0][None]
    long = "a red circle " * 20
    found = scorer(folder).score(image, [long])
    assert found == scorer(folder).score(image, ["a red circle " * 30])
    assert found != scorer(folder).score(image, ["a red circle"])


def test_the_released_architecture_is_blip_with_a_large_tower():
    vision, text = RELEASED["vision_config"], RELEASED["text_config"]
    assert (vision["hidden_size"], vision["num_hidden_layers"], vision["image_size"]) == (
        1024,
        24,
        224,
    )
    assert (vision["layer_norm_eps"], text["layer_norm_eps"]) == (1e-6, 1e-12)
    assert text["num_attention_heads"] == 12 and text["vocab_size"] == 30524


def test_other_weights_are_refused_by_their_names(copy):
    file = copy / "model.safetensors"
    state = load_file(file)
    norm = state.pop("blip.visual_encoder.blocks.1.norm2.bias")
    save_file(state, file)
    with pytest.raises(ModelError, match=r"lacks .*vision\.encoder\.layers\.1\.layer_norm2\.bias"):
        scorer(copy).score(two_images()[0][None], ["a"])
    whole = {**state, "blip.visual_encoder.blocks.1.norm2.bias": norm}
    save_file({**whole, "blip.itm_head.bias": torch.zeros(2)}, file)
    with pytest.raises(ModelError, match=r"has not: blip\.itm_head\.bias"):
        scorer(copy).score(two_images()[0][None], ["a"])


def test_a_configuration_of_another_model_is_refused(copy):
    (copy / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="is of a clip, and ImageReward is a blip"):
        scorer(copy).score(two_images()[0][None], ["a"])


def test_a_pickle_is_refused_with_the_command_that_converts_it():
    with pytest.raises(ModelError, match=r"diffalign convert THUDM/ImageReward/ImageReward\.pt"):
        _ = ImageReward(path="THUDM/ImageReward/ImageReward.pt").fingerprint


def test_a_folder_without_tokenizer_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="tokenizer: cannot read a BERT tokenizer"):
        ImageReward(path=str(folder), tokenizer=str(tmp_path)).score(two_images()[0][None], ["a"])
