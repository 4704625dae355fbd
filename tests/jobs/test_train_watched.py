"""Runs with previews and held-out evaluation, whole: images and responses, killed, on two ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffalign import config
from diffalign.errors import ConfigError
from diffalign.jobs import train
from diffalign.training.config import RunConfig
from tests import layouts
from tests.jobs.killing import kill_when, step_reached
from tests.processes import run_ranks
from tests.responses import random_image
from tests.runs import figures, files, forget_accelerate
from tests.tiny_vlm import tiny_llava

SMOKE = Path(__file__).parents[2] / "configs/smoke/diffusion_dpo_sdxl.yaml"
WATCHED = (
    "data.holdout=0.3",
    "evaluation={every: 3, visits: 2}",
    "previews={every: 2, prompts: [a red thing, a <blue> thing], steps: 2, guidance: 2.0}",
)


@pytest.fixture(scope="module")
def load(tiny_sdxl, tmp_path_factory):
    """Makes runs of five steps of a LoRA with dropout."""
    data = layouts.write_pickapic(tmp_path_factory.mktemp("data"), layouts.make_pairs(12))

    def load(output: Path, *more: str) -> RunConfig:
        settings = [f"model.path={tiny_sdxl}", f"data.path={data}", f"output={output}"]
        settings += ["data.resolution=32", "optimizer.lr=1e-3", "model.lora.dropout=0.3"]
        settings += ["training.samples_per_device=2", "training.optimizer_steps=5"]
        settings += ["training.checkpoint_every=3", "training.log_every=1"]
        return config.load(RunConfig, SMOKE, [*settings, *more])

    return load


@pytest.fixture(scope="module")
def whole(load, tmp_path_factory) -> Path:
    """A run that is watched."""
    run = load(tmp_path_factory.mktemp("runs") / "whole", *WATCHED)
    train.run(run)
    forget_accelerate()
    return run.output


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoint-5/weights.safetensors")


def test_a_watched_run_ends_with_the_weights_of_one_that_is_not(load, whole, tmp_path):
    plain = load(tmp_path / "plain", WATCHED[0], "evaluation.every=1000")
    train.run(plain)
    ours, theirs = weights(whole), weights(plain.output)
    assert ours and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_its_folder_has_images_of_every_step_a_strip_a_page_and_held_out_figures(whole):
    names = sorted(path.name for path in (whole / "previews").iterdir())
    assert names == [
        "index.html",
        "previews.json",
        *(f"step-{step:08d}-{i}.png" for step in (0, 2, 4, 5) for i in (0, 1)),
        "strip.png",
    ]
    frames = [(whole / f"previews/step-{step:08d}-0.png").read_bytes() for step in (0, 2, 4, 5)]
    assert len(set(frames)) == 4  # the weights moved, and so did what they make
    rows = [row for row in figures(whole) if "held_out/loss" in row]
    assert [row["step"] for row in rows] == [0, 3, 5]
    assert rows[0]["held_out/accuracy"] == 0.5 and rows[0]["held_out/drift/chosen"] == 0.0
    assert rows[-1]["held_out/accuracy_low"] < rows[-1]["held_out/accuracy_high"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_killed_between_two_previews_ends_with_the_same_previews_and_weights(
    load, whole, tmp_path
):
    killed = load(tmp_path / "killed", *WATCHED)
    config.save(killed, tmp_path / "killed.yaml")
    kill_when(tmp_path / "killed.yaml", partial(step_reached, killed.output, 4))
    train.run(killed, resume=killed.output)
    assert files(killed.output / "previews") == files(whole / "previews")
    assert figures(killed.output) == figures(whole)
    assert all(torch.equal(value, weights(whole)[n]) for n, value in weights(killed.output).items())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_share_the_evaluation_and_one_makes_the_previews(load, tmp_path):
    one = load(tmp_path / "one", *WATCHED, "model.lora.dropout=0.0")
    train.run(one)
    two = load(
        tmp_path / "two",
        *WATCHED,
        "model.lora.dropout=0.0",
        "training.samples_per_device=1",
    )
    config.save(two, tmp_path / "two.yaml")
    run_ranks("train", str(tmp_path / "two.yaml"), log=tmp_path / "log")
    ours = [row for row in figures(one.output) if "held_out/loss" in row]
    theirs = [row for row in figures(two.output) if "held_out/loss" in row]
    assert [row["step"] for row in theirs] == [0, 3, 5]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["held_out/pairs"] == other["held_out/pairs"]
        assert mine["held_out/loss"] == pytest.approx(other["held_out/loss"], abs=1e-3)
    names = [sorted(p.name for p in (run.output / "previews").iterdir()) for run in (one, two)]
    assert names[0] == names[1]


@pytest.fixture
def responses(tmp_path) -> list[str]:
    """Settings of a run on eight responses about four images."""
    model = tiny_llava(tmp_path / "llava")
    rows = []
    for i in range(8):
        random_image("watched", i % 4, size=(12, 12)).save(tmp_path / f"{i % 4}.png")
        row = {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."}
        rows.append({**row, "images": [f"{i % 4}.png"]})
    import json

    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"responses.path={file}", f"model.path={model}", f"output={tmp_path / 'run'}"]


RUN = """
output: unset
model: {kind: vlm, path: unset, lora: {rank: 2}}
responses: {path: unset, workers: 0, holdout: 0.5}
likelihood: {kind: tokens}
objective: {kind: dpo, beta: 0.1}
optimizer: {lr: 1.0e-2}
training: {optimizer_steps: 2, samples_per_device: 2, log_every: 1}
evaluation: {every: 1}
previews: {every: 1, count: 2, max_new_tokens: 4}
tracking: {trackers: [tensorboard]}
"""


def test_responses_are_previewed_and_held_out_by_image(responses, tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    run = config.load(RunConfig, tmp_path / "run.yaml", responses)
    train.run(run)
    previews = run.output / "previews"
    assert sorted(p.name for p in previews.glob("step-*")) == [
        f"step-{step:08d}-{i}.txt" for step in (0, 1, 2) for i in (0, 1)
    ]
    assert "What is" in (previews / "index.html").read_text()
    rows = figures(run.output)
    assert all(row["held_out/pairs"] % 2 == 0 for row in rows)  # two of each image
    assert rows[0]["held_out/accuracy"] == 0.5 and rows[0]["step"] == 0
    events = EventAccumulator(
        str(next(run.output.rglob("events.out*")).parent), size_guidance={"tensors": 0}
    )
    events.Reload()
    assert [event.step for event in events.Tensors("previews/0/text_summary")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["previews.prompts=[a fox]"], r"previews\.prompts is given, and the model vlm makes resp"),
        (["previews.questions=[{text: x, image: no.png}]"], r"no\.png: there is no such image"),
    ],
)
def test_what_cannot_be_watched_is_refused(overrides, message, responses, tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    with pytest.raises(ConfigError, match=message):
        train.run(
            config.load(RunConfig, tmp_path / "run.yaml", [*responses, *overrides]), dry_run=True
        )


def test_images_take_prompts_and_no_questions(load, tmp_path):
    with pytest.raises(
        ConfigError, match=r"previews\.questions is given, and the model sdxl makes"
    ):
        train.run(load(tmp_path / "run", "previews.questions=[{text: which}]"), dry_run=True)
