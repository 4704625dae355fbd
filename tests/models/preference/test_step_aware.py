from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import ModelError
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings
from diffalign.models.preference.step_aware import StepAwarePreference
from diffalign.scorers.step_aware import StepAware, tower_pixels
from tests.tiny_clip import IMAGE_SIZE, write_clip

CPU = torch.device("cpu")
PROMPTS = ["a cat", "a dog", "a cat"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def settings(clip, tiny_sdxl):
    def make(**changes):
        return StepAwarePreference(
            **{"path": str(clip), "base": SDXL(path=str(tiny_sdxl)), **changes}
        )

    return make


def load(settings, dtype=torch.float32):
    settings.check()
    return settings.load(device=CPU, compute_dtype=dtype, reference="none")


def scores_of(model, images, t):
    tokens, rows = model.tokens(PROMPTS), torch.arange(3)
    with torch.no_grad():
        return model.scores(tower_pixels(images, IMAGE_SIZE), t, tokens, rows)


def disturb(model):
    generator = torch.Generator().manual_seed(0)
    for _, parameter in model.trained_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_what_it_exports_scores_as_it_does(settings, tmp_path):
    model = load(settings())
    disturb(model)
    model.export(tmp_path / "final")
    images, t = torch.rand(3, 3, 40, 40) * 2 - 1, torch.tensor([1, 501, 951])
    exported = StepAware(path=str(tmp_path / "final")).score(images, PROMPTS, t)
    torch.testing.assert_close(exported, scores_of(model, images, t))


def test_an_average_is_exported_in_place_of_the_weights(settings, tmp_path):
    model = load(settings(towers="vision"))
    zeros = {name: torch.zeros_like(p) for name, p in model.trained_parameters()}
    model.export(tmp_path / "final", zeros)
    state = load_file(tmp_path / "final/model.safetensors")
    assert not state["model.visual_projection.weight"].any()
    assert torch.equal(
        state["model.text_projection.weight"], model.network.model.text_projection.weight
    )


def test_both_towers_train_unless_told_otherwise(settings):
    both = {name for name, _ in load(settings()).trained_parameters()}
    vision = {name for name, _ in load(settings(towers="vision")).trained_parameters()}
    frozen = both - vision
    assert {"model.logit_scale", "model.text_projection.weight"} <= frozen
    assert all(".vision_model." in n or "visual" in n or "t_embedder" in n for n in vision)
    assert any("adaLN" in name for name in vision)
    assert any(name.startswith("model.text_model.") for name in frozen)


@pytest.mark.parametrize("backbone", [SD15, SDXL])
def test_the_base_is_frozen(clip, tiny_sd15, tiny_sdxl, backbone):
    base = backbone(path=str(tiny_sd15 if backbone is SD15 else tiny_sdxl))
    model = load(StepAwarePreference(path=str(clip), base=base))
    assert not any(p.requires_grad for p in model.base.network.parameters())
    assert not any("unet" in name for name, _ in model.trained_parameters())


def test_it_computes_in_reduced_precision_with_weights_in_full(settings):
    images, t = torch.rand(3, 3, 40, 40) * 2 - 1, torch.tensor([1, 501, 951])
    full, reduced = load(settings()), load(settings(), torch.bfloat16)
    rounded = scores_of(reduced, images, t)
    assert rounded.dtype == torch.float32
    assert {p.dtype for _, p in reduced.trained_parameters()} == {torch.float32}
    error = (rounded - scores_of(full, images, t)).abs().max()
    assert 0 < error < 0.1


def test_rows_are_counted(settings):
    model = load(settings())
    scores_of(model, torch.zeros(3, 3, 40, 40), torch.tensor([1, 1, 1]))
    assert model.evaluations == 3


def test_other_weights_have_another_fingerprint(settings, tmp_path, tiny_sdxl_v):
    other_clip = str(write_clip(tmp_path, seed=5))
    fingerprints = [
        load(settings(**changes)).fingerprint()
        for changes in (
            {},
            {"seed": 1},
            {"path": other_clip},
            {"base": SDXL(path=str(tiny_sdxl_v))},
            {"towers": "vision"},
        )
    ]
    assert len(set(fingerprints)) == 4, "the seed is a setting of its own"
    assert fingerprints[0] == fingerprints[1]


def test_a_reference_is_refused(settings):
    with pytest.raises(ModelError, match="reference is frozen_copy: use none"):
        settings().load(device=CPU, compute_dtype=torch.float32, reference="frozen_copy")
    with pytest.raises(ValueError, match="compared with nothing"):
        load(settings()).reference()


def test_a_missing_clip_is_refused_before_weights(settings, tmp_path):
    with pytest.raises(ModelError, match=r"path: .*holds no config\.json"):
        settings(path=str(tmp_path)).check()


def test_a_missing_tokenizer_is_refused_before_weights(settings, clip, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((clip / name).read_bytes())
    with pytest.raises(ModelError, match="path: cannot read a CLIP tokenizer"):
        settings(path=str(tmp_path)).check()
    settings(path=str(tmp_path), tokenizer=str(clip)).check()


def test_an_adapter_of_the_base_is_refused(settings, tiny_sdxl):
    with pytest.raises(ValueError, match=r"base\.lora adapts a model that is not trained here"):
        settings(base=SDXL(path=str(tiny_sdxl), lora=LoraSettings(rank=2)))


def test_guidance_below_one_is_refused(settings):
    with pytest.raises(ValueError, match="guidance must be at least 1, got 0"):
        settings(guidance=0)


def test_it_says_what_is_trained_and_for_which_model(settings, tiny_sdxl, clip):
    described = settings().describe()
    assert str(clip) in described and str(tiny_sdxl) in described and "guidance 5" in described
