"""Reward models: what trains, what is written, and that the scorer `trained` reads it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image

from diffalign import config
from diffalign.errors import ModelError
from diffalign.models.base import AbstractModel
from diffalign.models.lora import LoraSettings
from diffalign.models.preference.clip_reward import CLIPReward
from diffalign.models.preference.heads.cosine import Cosine
from diffalign.models.preference.heads.general import General
from diffalign.models.preference.heads.linear import Linear
from diffalign.models.preference.heads.pal import PAL
from diffalign.models.preference.vlm_reward import VLMReward
from diffalign.models.vlm.config import VLM
from diffalign.scorers.pickscore import PickScore
from diffalign.scorers.trained import Trained
from tests.tiny_clip import write_clip
from tests.tiny_vlm import tiny_llava

PROMPTS = ["a cat", "a dog and a cat", "a cat"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return str(tiny_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 256, (3, 40, 40, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(each.numpy()) for each in levels]


def loaded(settings, dtype=torch.float32):
    settings.check()
    return settings.load(device=torch.device("cpu"), compute_dtype=dtype, reference="none")


def disturb(model):
    generator = torch.Generator().manual_seed(0)
    for _, parameter in model.trained_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def outputs(model, images, users=None):
    model.network.eval()
    with torch.no_grad():
        return model.outputs(model.read(images, PROMPTS), users)


def settings_of(kind, clip, llava):
    if kind.startswith("vlm"):
        lora = LoraSettings(rank=2) if "lora" in kind else None
        whole = {} if lora else {"tower": "trained", "projector": "trained"}
        base = VLM(path=llava, lora=lora, **whole)
        return VLMReward(base=base, question="Is this {prompt}?", head=Linear(hidden=4))
    towers, head = {
        "clip head": ("frozen", Linear(hidden=4)),
        "clip vision": ("vision", Linear()),
        "clip all": ("all", Cosine()),
        "clip pal": ("frozen", PAL(users=("ann", "bob"), dimensions=3)),
    }[kind]
    return CLIPReward(path=clip, towers=towers, head=head)


KINDS = ["clip head", "clip vision", "clip all", "clip pal", "vlm", "vlm lora"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_exports_scores_as_it_does(kind, clip, llava, images, tmp_path):
    model = loaded(settings_of(kind, clip, llava))
    before = outputs(model, images, *([torch.tensor([1, 1, 1])] if kind == "clip pal" else []))
    disturb(model)
    expected = outputs(model, images, *([torch.tensor([1, 1, 1])] if kind == "clip pal" else []))
    assert not torch.allclose(before, expected)
    model.export(tmp_path / "run/final")
    scorer = Trained(
        path=str(tmp_path / "run"), user="bob" if kind == "clip pal" else None, images_per_batch=2
    )
    found = scorer.score_images(images, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert scorer.fingerprint == Trained(path=scorer.path, user=scorer.user).fingerprint
    assert (tmp_path / "run/final/encoder").is_dir() == (kind not in ("clip head", "clip pal"))


def test_a_clip_with_its_own_score_begins_and_ends_as_pickscore(clip, images, tmp_path):
    model = loaded(settings_of("clip all", clip, None))
    plain = PickScore(path=clip).score_images(images, PROMPTS)
    torch.testing.assert_close(outputs(model, images), plain)
    disturb(model)
    model.export(tmp_path / "final")
    torch.testing.assert_close(
        PickScore(path=str(tmp_path / "final/encoder")).score_images(images, PROMPTS),
        outputs(model, images),
    )


def test_an_average_is_exported_in_place_of_the_weights(clip, images, tmp_path):
    model = loaded(settings_of("clip head", clip, None))
    disturb(model)
    zeros = {name: torch.zeros_like(p) for name, p in model.trained_parameters()}
    model.export(tmp_path, zeros)
    plain = PickScore(path=clip).score_images(images, PROMPTS)
    torch.testing.assert_close(Trained(path=str(tmp_path)).score_images(images, PROMPTS), plain)


@pytest.mark.parametrize(
    ("kind", "parts"), [("clip head", {"head"}), ("clip vision", {"head", "encoder"})]
)
def test_what_trains(kind, parts, clip):
    names = [name for name, _ in loaded(settings_of(kind, clip, None)).trained_parameters()]
    assert {name.partition(".")[0] for name in names} == parts
    assert not any("text" in name for name in names)


def test_the_head_over_the_vocabulary_does_not_train(llava):
    names = [name for name, _ in loaded(settings_of("vlm", None, llava)).trained_parameters()]
    assert not any("lm_head" in name for name in names)
    assert any("vision_tower" in name for name in names) and any("head." in n for n in names)


def test_longer_rows_do_not_change_a_score(llava, images):
    model = loaded(settings_of("vlm", None, llava))
    disturb(model)
    together = outputs(model, images)
    with torch.no_grad():
        alone = [
            model.outputs(model.read([i], [p]), None) for i, p in zip(images, PROMPTS, strict=True)
        ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-5)


def test_settings_come_back_from_a_config():
    given = VLMReward(base=VLM(path="a model"), head=PAL(users=("ann",)))
    assert config.from_dict(AbstractModel, config.to_dict(given)) == given


def test_what_cannot_be_is_refused(clip, llava, tmp_path):
    with pytest.raises(ValueError, match=r"set base\.kind to vlm"):
        VLMReward(base=CLIPReward(path=clip, head=Linear()), head=Linear())
    with pytest.raises(ValueError, match=r"must hold \{prompt\} once"):
        VLMReward(base=VLM(path=llava), question="Is it good?", head=Linear())
    with pytest.raises(ModelError, match="nothing trains"):
        loaded(CLIPReward(path=clip, head=Cosine()))
    with pytest.raises(ModelError, match="this encoder has none: take linear"):
        loaded(VLMReward(base=VLM(path=llava), head=Cosine()))
    with pytest.raises(ModelError, match="there is no such folder"):
        _ = Trained(path=str(tmp_path / "none")).fingerprint
    with pytest.raises(ModelError, match="is no trained reward model"):
        _ = Trained(path=clip).fingerprint


def test_a_scorer_needs_the_right_user_and_a_score(clip, images, tmp_path):
    loaded(settings_of("clip pal", clip, None)).export(tmp_path / "pal")
    for user in (None, "anne"):
        with pytest.raises(ModelError, match="knows the users ann, bob"):
            Trained(path=str(tmp_path / "pal"), user=user).score_images(images, PROMPTS)
    loaded(settings_of("clip head", clip, None)).export(tmp_path / "one")
    with pytest.raises(ModelError, match="knows no users"):
        Trained(path=str(tmp_path / "one"), user="ann").score_images(images, PROMPTS)
    general = CLIPReward(path=clip, head=General())
    loaded(general).export(tmp_path / "general")
    with pytest.raises(ModelError, match="gives none a score of its own"):
        Trained(path=str(tmp_path / "general")).score_images(images, PROMPTS)
    assert json.loads((tmp_path / "general/reward.json").read_text())["model"]["head"]["tau"] == 0.1


def test_a_head_on_another_clip_than_its_own_is_refused(images, tmp_path):
    clip = write_clip(tmp_path / "clip")
    loaded(settings_of("clip head", str(clip), None)).export(tmp_path / "final")
    Trained(path=str(tmp_path / "final")).score_images(images, PROMPTS)
    write_clip(clip, seed=5)
    with pytest.raises(ModelError, match="what lies there now is another one"):
        Trained(path=str(tmp_path / "final")).score_images(images, PROMPTS)


def test_an_answer_that_the_model_knows_begins_the_score(llava, images):
    base = VLM(path=llava)
    asks = VLMReward(base=base, question="Is this {prompt}?", answers=("a", "b"), head=Linear())
    model = loaded(asks)
    found = outputs(model, images)
    scorer = model.network.encoder.scorer
    inputs = model.read(images, PROMPTS)
    last = inputs["attention_mask"].sum(dim=1) - 1
    with torch.no_grad():
        logits = scorer.model(**inputs).logits[torch.arange(3), last]
    yes, no = model.network.encoder.answers
    torch.testing.assert_close(found, logits[:, yes] - logits[:, no], rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="begin with the same token"):
        loaded(dataclasses.replace(asks, answers=("ab", "ab")))
    with pytest.raises(ValueError, match="answers are two"):
        dataclasses.replace(asks, answers=("a",))


def test_the_projector_has_its_own_rate(llava):
    base = VLM(path=llava, lora=LoraSettings(rank=2), projector="trained", projector_lr=1e-3)
    settings = VLMReward(base=base, head=Linear())
    assert settings.own_rates == {"model.base.projector_lr": 1e-3}
    model = loaded(settings)
    names = {name for name, _ in model.trained_parameters() if "projector" in name}
    assert names and set(model.learning_rates()) == names
