"""On a ViT-H-14 in small, with random weights in open_clip's layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from torchvision.transforms import Compose, InterpolationMode, Normalize, ToTensor
from torchvision.transforms import functional as tv

from diffalign.errors import ModelError
from diffalign.imaging.image_files import to_images
from diffalign.scorers.hpsv2 import HPSv2
from tests.tiny_rewards import HPS, two_images, write_hpsv2

PROMPTS = ["a red circle", "a blue square"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hpsv2")
    write_hpsv2(path)
    return path


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def authors_transform(image, *, antialias: bool = True) -> torch.Tensor:
    """Longest side to 32, black on both sides, as in their transform.py."""
    tensor = ToTensor()(image)
    height, width = tensor.shape[1:]
    scale = 32 / max(height, width)
    new = [round(height * scale), round(width * scale)]
    tensor = tv.resize(tensor, new, InterpolationMode.BICUBIC, antialias=antialias)
    below, right = 32 - new[0], 32 - new[1]
    tensor = tv.pad(
        tensor, [right // 2, below // 2, right - right // 2, below - below // 2], fill=0
    )
    return Compose([Normalize(MEAN, STD)])(tensor)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("number", [0, 1])
def test_images_are_prepared_as_by_the_authors(folder, number, antialias):
    (image,) = to_images(two_images()[number][None])
    found = HPSv2(path=str(folder), antialias=antialias).prepare(image)
    assert found.shape == (3, 32, 32)
    expected = authors_transform(image, antialias=antialias)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    assert torch.allclose(found[:, 0, 0] if number else found[:, 16, 0], black)  # what is padded


def test_antialiasing_is_not_what_it_is_without(folder):
    scores = [
        HPSv2(path=str(folder), antialias=on).score(two_images()[0][None], PROMPTS[:1])
        for on in (True, False)
    ]
    assert abs(scores[0] - scores[1]) > 1e-2
    assert HPSv2(path=str(folder), antialias=False).fingerprint.endswith("aliased")


def test_the_score_is_a_hundred_cosines_of_open_clips_features(tmp_path):
    network = write_hpsv2(tmp_path)
    tokens = open_clip.SimpleTokenizer(context_length=20)(PROMPTS)
    scorer = HPSv2(path=str(tmp_path))
    found, expected = [], []
    for image in two_images():
        pixels = authors_transform(to_images(image[None])[0])[None]
        with torch.no_grad():
            seen = normalize(network.encode_image(pixels).double(), dim=-1)
            read = normalize(network.encode_text(tokens).double(), dim=-1)
        expected += (100 * seen @ read.T)[0].tolist()
        found += scorer.score(image[None].expand(2, -1, -1, -1), PROMPTS).tolist()
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(found) - min(found) > 1  # the comparison would also hold for a constant


def test_a_file_alone_is_taken_for_the_released_architecture(copy):
    (copy / "open_clip_config.json").unlink()
    with pytest.raises(ModelError, match=r"lacks weights of this network: .*resblocks"):
        HPSv2(path=str(copy / "open_clip_model.safetensors")).score(two_images()[0][None], ["a"])


def test_other_weights_are_refused_by_their_names(copy):
    file = copy / "open_clip_model.safetensors"
    state = load_file(file)
    scale = state.pop("logit_scale")
    save_file(state, file)
    with pytest.raises(ModelError, match="lacks weights of this network: logit_scale"):
        HPSv2(path=str(copy)).score(two_images()[0][None], ["a"])
    save_file({**state, "logit_scale": scale, "score_predictor.bias": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="holds weights that this network has not: score_pred"):
        HPSv2(path=str(copy)).score(two_images()[0][None], ["a"])


def test_a_configuration_of_something_else_is_refused(copy):
    (copy / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 8}}')
    with pytest.raises(ModelError, match="describes no CLIP of open_clip's under model_cfg"):
        HPSv2(path=str(copy)).score(two_images()[0][None], ["a"])


def test_a_pickle_is_refused_with_the_command_that_converts_it(copy):
    torch.save({"state_dict": {}}, copy / "HPS_v2.1_compressed.pt")
    with pytest.raises(
        ModelError,
        match=r"(?s)weights_only.*diffalign convert .*HPS_v2\.1_compressed\.pt "
        r"output=HPS_v2\.1_compressed\.safetensors$",
    ):
        HPSv2(path=str(copy / "HPS_v2.1_compressed.pt")).score(two_images()[0][None], ["a"])
    with pytest.raises(ModelError, match=r"diffalign convert xswu/HPSv2/HPS_v2_compressed\.pt"):
        _ = HPSv2(path="xswu/HPSv2/HPS_v2_compressed.pt").fingerprint  # before it is fetched
    (copy / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"(?s)it holds: HPS_v2\.1.*diffalign convert FILE"):
        _ = HPSv2(path=str(copy)).fingerprint


def test_the_released_architecture_is_vit_h_14():
    settings = open_clip.get_model_config("ViT-H-14")
    assert settings["vision_cfg"]["layers"] == 32 and settings["embed_dim"] == 1024
    assert HPS.keys() == settings.keys()


def test_without_open_clip_its_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'diffalign\[clip\]'"):
        HPSv2(path=str(folder))
