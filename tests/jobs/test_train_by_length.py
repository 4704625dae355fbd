"""Runs whose forward passes are cut by length: the steps of those that are not."""

from __future__ import annotations

import json
import math
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign import config
from diffalign.errors import ConfigError, DataError
from diffalign.jobs import train
from diffalign.training import build
from diffalign.training.config import RunConfig
from tests.jobs.killing import kill_when, step_reached
from tests.processes import run_ranks
from tests.responses import random_image
from tests.runs import figures
from tests.tiny_vlm import tiny_llava, tiny_qwen2_vl

RUN = """
output: unset
model: {{kind: vlm, path: {folder}/llava, lora: {{rank: 2}}}}
responses:
  path: {folder}/pairs.jsonl
  workers: 0
  max_length: 128
  conditions: {{crop: {{kind: crop}}}}
likelihood: {{kind: tokens}}
objective:
  kind: weighted_sum
  terms:
    - objective: {{kind: dpo, beta: 0.1}}
    - {{objective: {{kind: dpo, beta: 0.1}}, views: {{rejected: chosen@crop}}}}
    - objective: {{kind: sft}}
optimizer: {{lr: 1.0e-2}}
training: {{optimizer_steps: 3, samples_per_device: 6, log_every: 1}}
"""
BY_LENGTH = {
    "cut": ("training.tokens_per_device=512",),
    "cut and packed": ("training.tokens_per_device=512", "responses.pack_to=512"),
    "repeated": ("training.tokens_per_device=600", "model.prefix=repeated"),
    "packed": ("responses.pack_to=300",),
    "in passes of two": ("training.samples_per_device=2", "training.accumulation=3"),
}
KTO = "objective={kind: kto, beta: 0.1, undesirable_weight: 1.5}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of unequal lengths, about one image, three or none; and rows of one response each."""
    folder = tmp_path_factory.mktemp("by_length")
    tiny_llava(folder / "llava")
    tiny_qwen2_vl(folder / "qwen2_vl")
    pairs, single = [], []
    for number in range(10):
        count = (1, 0, 3)[number % 3]
        images = []
        for place in range(count):
            random_image(number, place, size=(20, 12)).save(folder / f"{number}-{place}.png")
            images.append(f"{number}-{place}.png")
        turn = {"role": "user", "content": "<image>" * count + "What is it?"}
        texts = {"chosen": "a cat" + " and a dog" * (number % 4), "rejected": "no" * (1 + number)}
        sides = {k: [{"role": "assistant", "content": text}] for k, text in texts.items()}
        pairs.append({"images": images, "prompt": [turn], **sides})
        completion = texts["rejected" if number % 3 else "chosen"]
        row = {"prompt": "What is it?", "completion": completion, "label": number % 3 == 0}
        single.append({**row, "images": images[:1]} if images else row)
    for name, rows in {"pairs": pairs, "single": single}.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "run.yaml").write_text(RUN.format(folder=folder))
    return folder


@pytest.fixture
def load(folder, tmp_path):
    def load(*overrides: str, output: str = "run", family: str = "llava") -> RunConfig:
        places = [f"output={tmp_path / output}", f"model.path={folder / family}"]
        return config.load(RunConfig, folder / "run.yaml", [*places, *overrides])

    return load


Trained = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


def trained(run: RunConfig) -> Trained:
    """Figures and last weights of a run."""
    train.run(run)
    steps = run.training.optimizer_steps
    return figures(run.output), load_file(run.output / f"checkpoint-{steps}/weights.safetensors")


def assert_alike(ours: Trained, theirs: Trained) -> None:
    """Losses to 1e-5, gradients to 1e-4 of them."""
    (rows, weights), (other_rows, others) = ours, theirs
    for one, other in zip(rows, other_rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert weights and all(torch.allclose(weights[k], others[k], atol=1e-5) for k in weights)


@pytest.fixture(scope="module")
def as_they_come(folder, tmp_path_factory):
    """Figures and last weights of runs that are not cut, by family."""
    output = tmp_path_factory.mktemp("as_they_come")

    @cache
    def of(family: str) -> Trained:
        places = [f"output={output / family}", f"model.path={folder / family}"]
        return trained(config.load(RunConfig, folder / "run.yaml", places))

    return of


@pytest.mark.parametrize("how", BY_LENGTH)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_step_is_the_same_however_it_is_cut(load, as_they_come, family, how):
    assert_alike(trained(load(*BY_LENGTH[how], family=family)), as_they_come(family))


@pytest.mark.parametrize(
    "objective",
    [KTO, "objective={kind: bco, beta: 0.1}", "objective={kind: sft}"],
    ids=["kto", "bco", "sft"],
)
def test_so_is_one_of_single_responses(load, folder, objective):
    data = [f"responses.path={folder / 'single.jsonl'}", objective]
    cut = ["training.tokens_per_device=256", "responses.pack_to=256"]
    ours, theirs = load(*data, *cut, output="ours"), load(*data, output="theirs")
    assert_alike(trained(ours), trained(theirs))


def test_a_loss_that_sorts_a_whole_step_sees_all_of_it(load):
    objective = "objective={kind: aot, beta: 0.1}"
    cut = "training.tokens_per_device=300"
    ours, theirs = load(objective, cut, output="ours"), load(objective, output="theirs")
    assert_alike(trained(ours), trained(theirs))


def test_the_start_and_the_log_say_how_much_is_padding(load, as_they_come, capsys):
    rows, _ = trained(load(*BY_LENGTH["cut and packed"], output="ours"))
    said = capsys.readouterr().out
    assert "6 samples per step = 6 per device, cut by length, x 1 processes" in said
    assert "samples of a step are cut by length: about" in said
    assert "rows are packed into sequences of up to 512 tokens" in said
    plain, _ = as_they_come("llava")
    assert all(one["padding"] < other["padding"] for one, other in zip(rows, plain, strict=True))


def test_passes_are_as_many_as_the_tokens_ask_for_the_longest_first(load):
    run = load("training.tokens_per_device=384")
    sizes: list[tuple[int, int]] = []
    source = build.build_source(run, build.Console(quiet=True), skipped=None)
    batches = iter(source)
    while sum(samples for samples, _ in sizes) < 6:
        batch = next(batches)
        rows = [part.attention_mask.sum(1) for part in batch.responses.values()]
        sizes.append((len(batch), int(torch.stack(rows).max())))
    assert sum(samples for samples, _ in sizes) == 6 and len(sizes) > 2
    assert [longest for _, longest in sizes] == sorted((n for _, n in sizes), reverse=True)
    assert source.state_dict()["samples"] == 6


CUT = (
    *BY_LENGTH["cut and packed"],
    "model.lora.dropout=0.1",
    "responses.workers=1",
    "training.optimizer_steps=9",
    "training.checkpoint_every=2",
    "training.ema_decay=0.9",
)


def test_a_run_killed_and_resumed_ends_bit_for_bit_alike(load, tmp_path):
    whole, killed = load(*CUT, output="whole"), load(*CUT, output="killed")
    train.run(whole)
    config.save(killed, tmp_path / "killed.yaml")
    kill_when(tmp_path / "killed.yaml", partial(step_reached, killed.output, 5))
    train.run(killed, resume=killed.output)
    assert figures(killed.output) == figures(whole.output)
    for name in ("weights", "average", "optimizer"):
        ours, theirs = (
            load_file(run.output / f"checkpoint-9/{name}.safetensors") for run in (killed, whole)
        )
        assert theirs and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_may_go_on_with_other_tokens_or_none(load, as_they_come):
    run = load("training.optimizer_steps=2", "training.tokens_per_device=512")
    train.run(run)
    longer = load("training.optimizer_steps=3")
    assert longer.training.tokens_per_device is None
    train.run(longer, resume=run.output)
    ours = load_file(run.output / "checkpoint-3/weights.safetensors")
    _, theirs = as_they_come("llava")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


@pytest.mark.multiprocess
@pytest.mark.parametrize("data", ["pairs", "single"])
def test_one_process_and_two_agree(load, folder, tmp_path, data):
    more = list(BY_LENGTH["cut and packed"])
    if data == "single":
        more += [f"responses.path={folder / 'single.jsonl'}", KTO]
    one = load(*more, "training.samples_per_device=3", "training.accumulation=2", output="one")
    two = load(*more, "training.samples_per_device=3", output="two")
    train.run(one)
    config.save(two, tmp_path / "two.yaml")
    run_ranks("train", str(tmp_path / "two.yaml"), log=tmp_path / "log")
    for ours, theirs in zip(figures(one.output), figures(two.output), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    first, second = (
        load_file(run.output / "checkpoint-3/weights.safetensors") for run in (one, two)
    )
    assert first and all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


# --- what is refused ------------------------------------------------------------------------------


def test_fewer_tokens_than_a_sample_may_have_are_refused(load):
    with pytest.raises(ConfigError, match=r"have 3 rows of 128 tokens.*set it to 384 or more"):
        train.run(load("training.tokens_per_device=383"), dry_run=True)
    assert train.run(load("training.tokens_per_device=384"), dry_run=True) is None
    less = load("training.tokens_per_device=383", "responses.max_length=127")
    assert train.run(less, dry_run=True) is None


def test_a_sample_that_is_longer_is_skipped_as_without(load):
    with pytest.raises(DataError, match="row above max_length"):
        train.run(load("training.tokens_per_device=180", "responses.max_length=60"))


def test_processes_that_wait_for_each_other_are_refused(load):
    run = load("training.tokens_per_device=512", "training.sharding=fsdp2", "model.lora=null")
    with pytest.raises(ConfigError, match=r"training\.sharding fsdp2 all wait for each other"):
        train.run(run)


def test_a_family_that_takes_no_mask_says_so_and_goes_on(load, monkeypatch, capsys):
    said = "tokens of its images see those after them, which such a mask replaces"
    for place in ("likelihoods.tokens", "models.vlm.model"):
        monkeypatch.setattr(f"diffalign.{place}.packing_obstacle", lambda *_, **__: said)
    rows, _ = trained(load(*BY_LENGTH["cut and packed"]))
    assert f"rows are not packed, since {said}: each is padded" in capsys.readouterr().out
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_attention_that_takes_no_mask_is_padded_and_cut_as_such(load, capsys):
    run = load(*BY_LENGTH["cut and packed"], "model.attention=eager")
    train.run(run, dry_run=True)
    said = capsys.readouterr().out
    assert "rows are not packed, since model.attention is eager" in said
    assert "rows are packed" not in said
