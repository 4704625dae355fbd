"""Scores of responses: those of transformers row by row, and a run that is read back at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from diffalign import config
from diffalign.data.decoding import decode
from diffalign.errors import ConfigError, ModelError
from diffalign.jobs import train
from diffalign.likelihoods.response_rewards import ResponseRewards
from diffalign.likelihoods.rewards import Rewards
from diffalign.models.lora import LoraSettings
from diffalign.models.preference.heads.linear import Linear
from diffalign.models.preference.response_scorer import Candidate, ResponseScorer
from diffalign.models.preference.vlm_reward import VLMReward
from diffalign.models.vlm.config import VLM
from diffalign.pair_judges.trained import TrainedPairJudge
from diffalign.scorers.trained import Trained
from diffalign.training.config import RunConfig
from tests.responses import pair, response_batch
from tests.runs import figures, forget_accelerate
from tests.tiny_vlm import tiny_llava, tiny_llava_next, tiny_qwen2_5_vl, tiny_qwen2_vl

ROOT = Path(__file__).parents[2]
FAMILIES = {
    "llava": tiny_llava,
    "llava_next": tiny_llava_next,
    "qwen2_vl": tiny_qwen2_vl,
    "qwen2_5_vl": tiny_qwen2_5_vl,
}


def loaded(path, **changes):
    settings = VLMReward(
        candidates="responses", base=VLM(path=str(path), **changes), head=Linear(hidden=4)
    )
    settings.check()
    model = settings.load(device=torch.device("cpu"), compute_dtype=torch.float32, reference="none")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.trained_parameters():
        if name.startswith("head."):
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return settings, model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_is_the_head_on_the_token_that_ends_a_response(family, tmp_path):
    path = FAMILIES[family](tmp_path / family)
    settings, model = loaded(path)
    model.network.eval()
    processor = settings.processor()
    batch = response_batch(processor, "chosen", "rejected")
    likelihood = ResponseRewards()
    found = likelihood.evaluate(model, likelihood.prepare(model, batch))
    plain = AutoModelForImageTextToText.from_pretrained(path).eval()
    head = model.network.get_submodule("head.layers")
    for view in ("chosen", "rejected"):
        for row in range(3):
            alone = response_batch(processor, view, order=[row])
            rows = alone.responses[view]
            with torch.no_grad():
                hidden = plain.model(
                    input_ids=rows.input_ids, **rows.further, **alone.images_of(view, None)
                ).last_hidden_state
                score = head(hidden[0, -1]).item()
            assert found[view][row].item() == pytest.approx(score, abs=1e-4)
    values = torch.cat([*found.values()])
    assert values.max() - values.min() > 1e-2


def test_bradley_terry_raises_the_chosen_score_with_a_gradient_in_the_language_model(tmp_path):
    settings, model = loaded(tiny_llava(tmp_path), lora=LoraSettings(rank=2))
    batch = response_batch(settings.processor(), "chosen", "rejected")
    likelihood = ResponseRewards()
    optimizer = torch.optim.SGD([p for _, p in model.trained_parameters()], lr=1e-2)
    margins = []
    for _ in range(3):
        found = likelihood.evaluate(model, likelihood.prepare(model, batch))
        margin = found["chosen"] - found["rejected"]
        margins.append(margin.mean().item())
        optimizer.zero_grad()
        torch.nn.functional.softplus(-margin).mean().backward()
        optimizer.step()
    assert margins[0] < margins[1] < margins[2]
    touched = [n for n, p in model.trained_parameters() if p.grad is not None and p.grad.any()]
    assert any("lora" in name for name in touched)


def test_what_a_score_is_of_must_be_said(tmp_path):
    path = str(tiny_llava(tmp_path / "llava"))
    of_images = VLMReward(base=VLM(path=path), head=Linear())
    of_responses = dataclasses.replace(of_images, candidates="responses")
    with pytest.raises(ValueError, match=r"model\.candidates to responses"):
        ResponseRewards().check(of_images)
    with pytest.raises(ValueError, match=r"model\.candidates to images"):
        Rewards().check(of_responses)
    with pytest.raises(ValueError, match="question and answers are what a model is asked"):
        dataclasses.replace(of_responses, answers=("Yes", "No"))
    with pytest.raises(ValueError, match="weighs tokens, and a reward model scores whole"):
        ResponseRewards().data_views(frozenset({"chosen:changed"}))
    for name, settings in (("images", of_images), ("responses", of_responses)):
        settings.load(
            device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
        ).export(tmp_path / name)
    with pytest.raises(ModelError, match=r"scores responses, and it is to score images"):
        Trained(path=str(tmp_path / "responses")).to("cpu")
    with pytest.raises(ModelError, match=r"scores responses, and it is to score images"):
        TrainedPairJudge(path=str(tmp_path / "responses")).to("cpu")
    with pytest.raises(ModelError, match=r"scores images, and it is to score responses"):
        ResponseScorer(tmp_path / "images")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A few steps of the shipped config."""
    folder = tmp_path_factory.mktemp("runs") / "reward"
    given = [
        f"output={folder}",
        f"responses.path={ROOT / 'assets/playground/responses'}",
        f"model.base.path={ROOT / 'assets/playground/llava'}",
        "responses.limit=64",
        "training.optimizer_steps=6",
        "training.samples_per_device=4",
        "training.log_every=2",
        "optimizer.warmup_steps=1",
        "evaluation.every=3",
    ]
    path = ROOT / "configs/playground/responses/reward.yaml"
    train.run(config.load(RunConfig, path, given))
    forget_accelerate()
    return folder


def test_a_run_has_held_out_accuracy_and_scores_at_once_what_it_was_trained_on(run):
    rows = [row for row in figures(run) if "held_out/accuracy" in row]
    assert len(rows) == 3 and "held_out/ece" in rows[-1]
    settings = json.loads((run / "final/reward.json").read_text())["model"]
    assert settings["candidates"] == "responses"
    scorer = ResponseScorer(run, batch_size=2)
    made = [pair(number, 1) for number in range(3)]
    asked = [
        Candidate(turns=each.turns, images=[decode(image) for image in each.images], response=text)
        for each in made
        for text in each.responses.values()
    ]
    together = scorer.score(asked)
    apart = [score for each in asked for score in scorer.score([each])]
    assert together == pytest.approx(apart, abs=1e-4)
    assert max(together) - min(together) > 1e-4


def test_sections_and_likelihoods_that_do_not_go_together_are_refused(tmp_path):
    path = ROOT / "configs/playground/responses/reward.yaml"
    given = [f"output={tmp_path}", "likelihood.kind=tokens"]
    with pytest.raises(ConfigError, match="tokens"):
        train.run(config.load(RunConfig, path, given))
    with pytest.raises(ConfigError, match=r"model\.candidates to responses"):
        train.run(config.load(RunConfig, path, [f"output={tmp_path}", "model.candidates=images"]))
