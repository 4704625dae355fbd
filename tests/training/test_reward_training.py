"""Reward models train through the common loop and come out as scorers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from diffalign import config
from diffalign.data.batches import ImageBatch
from diffalign.errors import ConfigError, DataError
from diffalign.jobs import train
from diffalign.likelihoods.rewards import Rewards
from diffalign.models.preference.clip_reward import CLIPReward
from diffalign.models.preference.heads.general import General, general_preference
from diffalign.models.preference.heads.linear import Linear
from diffalign.objectives.base import Likelihoods
from diffalign.objectives.bradley_terry import BradleyTerry
from diffalign.scorers.trained import Trained
from diffalign.training.checks import check
from diffalign.training.config import RunConfig
from tests.layouts import make_pairs, pickapic_rows, write_rows
from tests.runs import forget_accelerate
from tests.tiny_clip import write_clip
from tests.tiny_vlm import tiny_llava

CONFIGS = Path(__file__).parents[2] / "configs/playground"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rows = pickapic_rows(make_pairs(12))
    for number, row in enumerate(rows):
        row["user_id"] = number % 2
    return write_rows(tmp_path_factory.mktemp("data") / "train.parquet", rows).parent


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def run_of(name, data, output, *more) -> RunConfig:
    overrides = [
        f"data.path={data}",
        "data.resolution=32",
        "data.holdout=0.3",
        f"output={output}",
        "optimizer.warmup_steps=0",
        "training.optimizer_steps=2",
        "training.samples_per_device=3",
        "training.log_every=1",
        *more,
    ]
    return config.load(RunConfig, CONFIGS / f"{name}.yaml", overrides)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "clip all, a cosine", "clip pal", "clip general", "vlm"])
def test_two_steps_change_it_and_what_is_written_scores(kind, clip, data, tmp_path):
    forget_accelerate()
    more = {
        "clip": (),
        "clip all, a cosine": (
            "model.towers=all",
            "model.head={kind: cosine}",
            "training.precision=bf16",
        ),
        "clip pal": ("model.head={kind: pal, users: ['0', '1']}", "data.users=user_id"),
        "clip general": ("model.head={kind: general}",),
        "vlm": (f"model.base.path={tiny_llava(tmp_path / 'llava')}", "model.answers=[]"),
    }[kind]
    path = () if kind == "vlm" else (f"model.path={clip}",)
    run = run_of(
        "reward_vlm" if kind == "vlm" else "reward_clip", data, tmp_path / "run", *path, *more
    )
    final = train.run(run)
    assert final is not None
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["held_out/pairs"] > 0
    assert 0 <= rows[-1]["held_out/accuracy"] <= 1 and 0 <= rows[-1]["held_out/ece"] <= 1
    if kind == "clip general":
        return
    scorer = Trained(path=str(tmp_path / "run"), user="1" if kind == "clip pal" else None)
    scores = scorer.score(torch.rand(2, 3, 40, 32) * 2 - 1, ["a red thing", "a blue one"])
    assert scores.isfinite().all() and scores.shape == (2,) and scores[0] != scores[1]


def batch(**changes):
    generator = torch.Generator().manual_seed(0)
    images = {
        view: torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
        for view in ("chosen", "rejected")
    }
    zeros = torch.zeros(2, 2, dtype=torch.int64)
    return dataclasses.replace(
        ImageBatch(
            sample_ids=("a", "b"),
            prompts=("", "b"),
            captions=("a", "b"),
            images=images,
            original_sizes=dict.fromkeys(images, zeros),
            crop_corners=dict.fromkeys(images, zeros),
            timesteps=torch.zeros(2, dtype=torch.float64),
            noise_seeds=(0, 0),
            encoding_seeds=dict.fromkeys(images, (0, 0)),
        ),
        **changes,
    )


def views_of(model, some):
    likelihood = Rewards()
    prepared = likelihood.prepare(model, some)
    found = likelihood.evaluate(model, prepared)
    known = likelihood.row_metadata(prepared)
    return {name: Likelihoods(rows, **known[name]) for name, rows in found.items()}


def loaded(clip, head):
    model = CLIPReward(path=str(clip), head=head).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
    )
    generator = torch.Generator().manual_seed(0)
    for _, parameter in model.trained_parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_a_soft_label_pulls_as_its_probability_says(clip):
    """The gradient in the margin of each of two pairs is (sigmoid(margin) - p) / 2."""
    soft = batch(strength={"preference": torch.tensor([0.8, 0.3])})
    views = views_of(loaded(clip, Linear()), soft)
    for view in views.values():
        view.policy.retain_grad()
    BradleyTerry()(views).loss.mean().backward()
    margin = (views["chosen"].policy - views["rejected"].policy).detach()
    expected = (torch.sigmoid(margin) - torch.tensor([0.8, 0.3])) / 2
    torch.testing.assert_close(views["chosen"].policy.grad, expected)
    torch.testing.assert_close(views["rejected"].policy.grad, -expected)


def test_embeddings_are_compared_as_the_two_sides_of_a_pair(clip):
    head = General(blocks=2, tau=0.5)
    model = loaded(clip, head)
    views = views_of(model, batch())
    prepared = Rewards().prepare(model, batch())
    chosen, rejected = model.outputs(prepared.inputs, None).chunk(2)
    margin = views["chosen"].policy - views["rejected"].policy
    torch.testing.assert_close(margin, general_preference(chosen, rejected, tau=0.5))
    turned = batch(images=dict(zip(("rejected", "chosen"), batch().images.values(), strict=True)))
    other = views_of(model, turned)
    torch.testing.assert_close(other["chosen"].policy, -views["chosen"].policy)


def test_whose_a_verdict_is_must_be_said(clip, data, tmp_path):
    pal = "model.head={kind: pal, users: ['0', '1']}"
    with pytest.raises(ConfigError, match=r"data\.users is null: name the column"):
        check(run_of("reward_clip", data, tmp_path, f"model.path={clip}", pal))
    with pytest.raises(ConfigError, match="this model has one taste for all"):
        check(run_of("reward_clip", data, tmp_path, f"model.path={clip}", "data.users=user_id"))
    forget_accelerate()
    unknown = ("model.head={kind: pal, users: ['0']}", "data.users=user_id")
    with pytest.raises(DataError, match=r"the user '1', who is none of model\.head\.users"):
        train.run(run_of("reward_clip", data, tmp_path / "a", f"model.path={clip}", *unknown))
    forget_accelerate()
    with pytest.raises(DataError, match=r"data\.users names users, and the data set has"):
        train.run(
            run_of(
                "reward_clip", data, tmp_path / "b", f"model.path={clip}", pal, "data.users=users"
            )
        )


def test_users_and_annotators_exclude_each_other(data, tmp_path):
    more = ("data.users=user_id", "data.annotators=image_0_uid, image_1_uid")
    with pytest.raises(ConfigError, match="adds up the verdicts of all"):
        run_of("reward_clip", data, tmp_path, *more)
