"""On a tiny CLIP with random weights; what is pinned is what happens around the network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel

from diffalign import config
from diffalign.comparison.score import read_column
from diffalign.errors import ModelError
from diffalign.imaging.image_files import to_images
from diffalign.jobs import score
from diffalign.models.preference.clip_loading import tower_input
from diffalign.scorers.pickscore import PickScore
from tests.tiny_clip import IMAGE_SIZE, write_clip
from tests.tiny_models import TOKENS

PROMPTS = ["a red circle", "a blue square left of a green cross", "a red circle"]
# transformers 4 has one processor, which resizes with PIL; 5 keeps that under another name.
Processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A CLIP with the layout of the published one."""
    return write_clip(tmp_path_factory.mktemp("pickscore"))


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def images(count: int = 3, height: int = 90, width: int = 70) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand((count, 3, height, width), generator=generator) * 2 - 1


def change_weights(folder: Path, change) -> None:
    """Rewrite the weights of a folder."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "shape", [(32, 32), (90, 70), (70, 90), (33, 101), (512, 512), (33, 32), (100, 67), (24, 96)]
)
def test_images_are_prepared_as_by_the_authors_processor(shape):
    (image,) = to_images(images(1, *shape))
    processor = Processor(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE)
    expected = processor(images=image, return_tensors="pt").pixel_values[0]
    found = tower_input(image, IMAGE_SIZE)
    assert found.shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    assert (found - expected).abs().max() < 1e-6


def test_the_score_is_that_of_the_authors_example(folder):
    processor = Processor(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE)
    pixels = processor(images=to_images(images()), return_tensors="pt").pixel_values
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer(PROMPTS, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    clip = CLIPModel.from_pretrained(folder).float().eval()
    with torch.no_grad():
        logits = clip(**text, pixel_values=pixels).logits_per_image
    scores = PickScore(path=str(folder)).score(images(), PROMPTS)
    assert scores.tolist() == pytest.approx(logits.diagonal().tolist(), abs=1e-5)
    assert scores.std() > 0.01  # the comparison would also hold for a constant


def test_a_score_depends_neither_on_its_company_nor_on_the_batch(folder):
    scorer = PickScore(path=str(folder))
    together = scorer.score(images(), PROMPTS)
    one_by_one = PickScore(path=str(folder), images_per_batch=1).score(images(), PROMPTS)
    swapped = scorer.score(images().flip(0), PROMPTS[::-1]).flip(0)
    assert together.tolist() == pytest.approx(one_by_one.tolist(), abs=1e-5)
    assert together.tolist() == pytest.approx(swapped.tolist(), abs=1e-5)


def test_dropout_is_off(tmp_path):
    write_clip(tmp_path, attention_dropout=0.5)
    scorer = PickScore(path=str(tmp_path))
    assert torch.equal(scorer.score(images(), PROMPTS), scorer.score(images(), PROMPTS))


def test_a_prompt_that_is_too_long_is_cut(folder):
    scorer = PickScore(path=str(folder))
    long = "a red circle " * 40
    assert scorer.score(images(1), [long]).isfinite().all()


def test_a_score_that_is_not_a_number_is_not_hidden(copy):
    change_weights(copy, lambda state: state["visual_projection.weight"].fill_(torch.nan))
    assert PickScore(path=str(copy)).score(images(), PROMPTS).isnan().all()


def test_loading_disturbs_no_random_number(folder):
    before = torch.get_rng_state()
    PickScore(path=str(folder)).score(images(), PROMPTS)
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_is_read_before_it_is_needed(tmp_path):
    scorer = PickScore(path=str(tmp_path / "absent"))
    with pytest.raises(ModelError, match=r"there is no file or folder .*absent"):
        scorer.score(images(), PROMPTS)


def test_the_fingerprint_is_that_of_the_weights_wherever_they_lie(folder, copy):
    original = PickScore(path=str(folder)).fingerprint
    assert PickScore(path=str(copy)).fingerprint == original
    change_weights(copy, lambda state: state["logit_scale"].add_(1))
    assert PickScore(path=str(copy)).fingerprint != original
    assert PickScore(path=str(folder), tokenizer=str(copy)).fingerprint != original


def test_another_tokenizer_can_be_named(folder, copy):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (copy / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="path: cannot read a CLIP tokenizer"):
        PickScore(path=str(copy)).score(images(), PROMPTS)
    scores = PickScore(path=str(copy), tokenizer=str(folder)).score(images(), PROMPTS)
    assert torch.equal(scores, PickScore(path=str(folder)).score(images(), PROMPTS))


def test_missing_weights_are_named_and_not_made_up(copy):
    change_weights(copy, lambda state: state.pop("visual_projection.weight"))
    with pytest.raises(ModelError, match=r"lacks weights of this network: visual_projection\.wei"):
        PickScore(path=str(copy)).score(images(), PROMPTS)


def test_a_step_aware_model_is_not_taken_for_a_plain_one(copy):
    added = {"vision_model.adaLN_modulation.1.bias": torch.zeros(2)}
    change_weights(copy, lambda state: state.update(added))
    with pytest.raises(ModelError, match=r"holds weights that this network has not: .*adaLN"):
        PickScore(path=str(copy)).score(images(), PROMPTS)


def test_weights_of_another_width_are_refused(copy):
    narrow = torch.zeros(8, 8)
    change_weights(copy, lambda state: state.update({"text_projection.weight": narrow}))
    with pytest.raises(ModelError, match=r"of another size.*text_projection.*\(8, 8\) there"):
        PickScore(path=str(copy)).score(images(), PROMPTS)


def test_a_pickle_is_read_only_on_request(copy):
    expected = PickScore(path=str(copy)).score(images(), PROMPTS)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors .*pytorch_model\.bin"):
        PickScore(path=str(copy)).score(images(), PROMPTS)
    pickled = str(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="set allow_pickle"):
        PickScore(path=pickled).score(images(), PROMPTS)
    allowed = PickScore(path=pickled, allow_pickle=True)
    assert torch.equal(allowed.score(images(), PROMPTS), expected)


def test_a_folder_without_configuration_is_refused(copy):
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        _ = PickScore(path=str(copy)).fingerprint
    with pytest.raises(ModelError, match=r"path: .* holds no config\.json of a CLIP"):
        PickScore(path=str(copy)).score(images(), PROMPTS)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="images_per_batch must be at least 1"):
        PickScore(images_per_batch=0)


def test_the_score_job_takes_it_by_name(folder, tmp_path):
    (image,) = to_images(images(1))
    image.save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text(PROMPTS[0])
    settings = ["scorer.kind=pickscore", f"scorer.path={folder}", f"images={tmp_path}"]
    score.run(config.load(score.ScoreConfig, None, [*settings, "device=cpu"]))
    expected = PickScore(path=str(folder)).score(images(1), PROMPTS[:1])
    (found,) = read_column(tmp_path / "scores" / "pickscore.jsonl").values()
    assert found == pytest.approx(expected.item(), abs=1e-5)
