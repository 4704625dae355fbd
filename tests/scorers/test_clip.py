"""On a tiny open_clip model with random weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity

from diffalign.errors import ModelError
from diffalign.imaging.image_files import to_images
from diffalign.scorers.clip import CLIPScore

MODEL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 8, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1},
}
PREPROCESSING = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
PROMPTS = ["a red circle", "a blue square", "a red circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder as open_clip writes it."""
    path = tmp_path_factory.mktemp("open_clip")
    content = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESSING}
    (path / "open_clip_config.json").write_text(json.dumps(content))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = open_clip.CLIP(**MODEL)
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter)  # far apart, so that scores differ
    save_file(network.state_dict(), path / "open_clip_model.safetensors")
    return path


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def images(count: int = 3, height: int = 50, width: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand((count, 3, height, width), generator=generator) * 2 - 1


def change_weights(folder: Path, change) -> None:
    """Rewrite the weights of a folder."""
    state = load_file(folder / "open_clip_model.safetensors")
    change(state)
    save_file(state, folder / "open_clip_model.safetensors")


def test_the_score_is_a_hundred_times_the_cosine_of_open_clips_features(folder):
    network = open_clip.CLIP(**MODEL).eval()
    network.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    preprocess = open_clip.image_transform(
        32, is_train=False, mean=PREPROCESSING["mean"], std=PREPROCESSING["std"]
    )
    pixels = torch.stack([preprocess(image) for image in to_images(images())])
    tokens = open_clip.SimpleTokenizer(context_length=20)(PROMPTS)
    with torch.no_grad():
        expected = 100 * cosine_similarity(
            network.encode_image(pixels), network.encode_text(tokens)
        )
    scores = CLIPScore(path=str(folder)).score(images(), PROMPTS)
    assert scores.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert scores.std() > 1  # the comparison would also hold for a constant


def test_a_bad_image_may_score_below_zero(folder):
    scores = CLIPScore(path=str(folder)).score(images(16), ["a red circle"] * 16)
    others = CLIPScore(path=str(folder)).score(images(16), ["a blue square"] * 16)
    assert min(scores.min(), others.min()) < 0


def test_a_score_depends_neither_on_its_company_nor_on_the_batch(folder):
    together = CLIPScore(path=str(folder)).score(images(), PROMPTS)
    one_by_one = CLIPScore(path=str(folder), images_per_batch=1).score(images(), PROMPTS)
    assert together.tolist() == pytest.approx(one_by_one.tolist(), abs=1e-3)


def test_a_score_that_is_not_a_number_is_not_hidden(copy):
    change_weights(copy, lambda state: state["visual.proj"].fill_(torch.nan))
    assert CLIPScore(path=str(copy)).score(images(), PROMPTS).isnan().all()


def test_the_fingerprint_is_that_of_weights_and_preprocessing_wherever_they_lie(folder, copy):
    original = CLIPScore(path=str(folder)).fingerprint
    assert CLIPScore(path=str(copy)).fingerprint == original
    config = copy / "open_clip_config.json"
    config.write_text(config.read_text().replace("bicubic", "bilinear"))
    assert CLIPScore(path=str(copy)).fingerprint != original


def test_missing_weights_are_named_and_not_made_up(copy):
    change_weights(copy, lambda state: state.pop("text_projection"))
    with pytest.raises(ModelError, match=r"cannot be read as an open_clip.*text_projection"):
        CLIPScore(path=str(copy)).score(images(), PROMPTS)


def test_weights_of_another_width_are_refused(copy):
    change_weights(copy, lambda state: state.update(text_projection=torch.zeros(2, 2)))
    with pytest.raises(ModelError, match=r"text_projection.*torch\.Size\(\[2, 2\]\)"):
        CLIPScore(path=str(copy)).score(images(), PROMPTS)


def test_a_pickle_is_not_taken_in_place_of_missing_safetensors(copy):
    state = load_file(copy / "open_clip_model.safetensors")
    torch.save(state, copy / "open_clip_pytorch_model.bin")
    (copy / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no open_clip_model\.safetensors .*model\.bin"):
        CLIPScore(path=str(copy)).score(images(), PROMPTS)
    with pytest.raises(ModelError, match="perhaps a pickle"):
        CLIPScore(path=str(copy / "open_clip_pytorch_model.bin")).score(images(), PROMPTS)


def test_weights_under_another_name_are_refused(copy):
    other = copy / "epoch_3.safetensors"
    (copy / "open_clip_model.safetensors").rename(other)
    with pytest.raises(ModelError, match="give the folder or hub id"):
        CLIPScore(path=str(other)).score(images(), PROMPTS)


@pytest.mark.parametrize("content", [None, "{", '{"preprocess_cfg": {}}', '{"model_cfg": {}}'])
def test_a_folder_without_a_model_configuration_is_refused(copy, content):
    config = copy / "open_clip_config.json"
    config.unlink() if content is None else config.write_text(content)
    with pytest.raises(ModelError, match="cannot be read as an open_clip model"):
        CLIPScore(path=str(copy)).score(images(), PROMPTS)


def test_nothing_is_read_before_it_is_needed(tmp_path):
    scorer = CLIPScore(path=str(tmp_path / "absent"))
    with pytest.raises(ModelError, match=r"there is no file or folder .*absent"):
        scorer.score(images(), PROMPTS)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="images_per_batch must be at least 1"):
        CLIPScore(images_per_batch=0)


def test_without_open_clip_its_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'diffalign\[clip\]'"):
        CLIPScore(path=str(folder))


def test_its_kind_is_listed_without_open_clip():
    code = (
        "import sys; sys.modules['open_clip'] = None\n"
        "from diffalign import components; from diffalign.scorers.base import AbstractScorer\n"
        "print('clip' in components.kinds(AbstractScorer))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "True"
