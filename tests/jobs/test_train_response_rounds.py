"""Rounds of responses through the train job: killed in every phase, in parallel, refused early."""

from __future__ import annotations

import math
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from safetensors.torch import load_file

from diffalign import config
from diffalign.errors import ConfigError
from diffalign.jobs import train
from diffalign.training.config import RunConfig
from tests.jobs.killing import kill_when, step_reached
from tests.processes import run_ranks
from tests.rollouts.response_questions import write_questions
from tests.runs import figures
from tests.tiny_vlm import tiny_llava

COMMON = (
    "model={kind: vlm, lora: {rank: 2}}",
    "rollouts.rewards=[{kind: tests.rollouts.letters}]",
    "rollouts.questions.kind=trl",
    "rollouts.questions_per_round=6",
    "rollouts.questions_per_batch=2",
    "rollouts.responses_per_question=4",
    "rollouts.max_new_tokens=5",
    "likelihood={kind: tokens, each_token: true}",
    "optimizer.lr=1e-3",
    "training={optimizer_steps: 4, samples_per_device: 4, log_every: 1, checkpoint_every: 2}",
)
ADVANTAGES = (
    *COMMON,
    "rollouts.kind=response_advantages",
    "objective={kind: grpo}",
)
PAIRS = (
    *COMMON,
    "rollouts.kind=response_pairs",
    "rollouts.pairs={kind: above_gap, most: 4}",
    "rollouts.offline_share=0.3",
    "rollouts.reference=latest",
    "objective={kind: dpo, beta: 0.1}",
)
WIN_RATES = (
    *(setting for setting in COMMON if not setting.startswith(("rollouts.rewards", "likelihood"))),
    "rollouts.rewards=[{kind: win_rate, reward: {kind: tests.rollouts.letters}, temperature: 0.2}]",
    "rollouts.kind=response_advantages",
    "rollouts.scale=none",
    "rollouts.reference=latest",
    "likelihood={kind: tokens}",
    "objective={kind: advantage_regression, beta: 0.1, divided_by_beta: true}",
)
KINDS = pytest.mark.parametrize(
    "settings", [ADVANTAGES, PAIRS, WIN_RATES], ids=["advantages", "pairs", "win_rates"]
)


@cache
def model() -> Path:
    return tiny_llava(Path(mkdtemp()))


def load(settings: tuple[str, ...], folder: Path, output: str, *more: str) -> RunConfig:
    path = folder / "questions.jsonl"
    write_questions(folder)
    return config.load(
        RunConfig,
        None,
        [
            *settings,
            f"model.path={model()}",
            f"rollouts.questions.path={path}",
            f"output={folder / output}",
            *more,
        ],
    )


def test_a_run_of_pairs_begins_at_the_reference_and_moves(tmp_path):
    final = train.run(load(PAIRS, tmp_path, "run", "model.lora.dropout=0"))
    found = figures(tmp_path / "run")
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found[1]["loss"] < found[0]["loss"]
    assert found[0]["round/offline"] > 0 and found[0]["round/letters_std"] > 0
    assert any(final.rglob("*.safetensors"))


def some(folder: Path, whole: int) -> bool:
    """Whether a folder has some of its files and not all."""
    return 0 < len([*folder.glob("*.jsonl")]) < whole


def writing(folder: Path) -> bool:
    return (folder / "responses.jsonl").exists() and not (folder / "round.json").exists()


@pytest.mark.slow
@KINDS
def test_killed_in_every_phase_and_resumed_a_run_ends_bit_for_bit_alike(tmp_path, settings):
    long = (
        "training.optimizer_steps=7",
        "rollouts.questions_per_batch=1",
        "model.lora.dropout=0.1",
    )
    torch.set_num_threads(1)
    train.run(load(settings, tmp_path, "whole", *long))
    run, output = load(settings, tmp_path, "killed", *long), tmp_path / "killed"
    config.save(run, tmp_path / "killed.yaml")
    first_round = output / "rounds/round-0000"
    moments = {
        "sampling": partial(some, first_round / "sampled", 6),
        "scoring": partial(some, first_round / "rewards", 6),
        "writing": partial(writing, first_round),
        "training": partial(step_reached, output, 3),
        "sampling the second round": partial(some, output / "rounds/round-0001/sampled", 6),
    }
    for number, moment in enumerate(moments.values()):
        kill_when(tmp_path / "killed.yaml", moment, resume=number > 0)
    train.run(run, resume=output)

    whole = tmp_path / "whole"
    assert figures(output) == figures(whole)
    for name in ("weights", "optimizer"):
        ours, theirs = (
            load_file(folder / f"checkpoint-7/{name}.safetensors") for folder in (output, whole)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    rounds = sorted(path.name for path in (whole / "rounds").glob("round-*"))
    assert len(rounds) > 1
    for number in rounds:
        for name in ("responses.jsonl", "rows.jsonl"):
            first, second = (folder / "rounds" / number / name for folder in (output, whole))
            assert first.read_bytes() == second.read_bytes()


@pytest.mark.multiprocess
@KINDS
def test_one_process_and_two_sample_score_and_train_alike(tmp_path, settings):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.run(load(settings, tmp_path, "one"))
    torch.set_num_threads(threads)
    two = load(settings, tmp_path, "two", "training.samples_per_device=2")
    config.save(two, tmp_path / "two.yaml")
    run_ranks("train", str(tmp_path / "two.yaml"), log=tmp_path / "log")
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("responses.jsonl", "rows.jsonl"):
        first, second = (folder / "rounds/round-0000" / name for folder in (one, two))
        assert first.read_bytes() == second.read_bytes()
    for ours, theirs in zip(figures(one), figures(two), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (ADVANTAGES, "objective={kind: sft}", "does not read the advantage of a pair"),
        (ADVANTAGES, "objective={kind: dpo, beta: 0.1}", "does not read the advantage of a pair"),
        (PAIRS, "objective={kind: grpo}", "take rollouts that sample groups of responses"),
        (
            PAIRS,
            "model={kind: sd15, path: x}",
            "samples responses, and the model sd15 makes images",
        ),
        (PAIRS, "data={path: x, resolution: 64}", "samples all that it trains on"),
        (PAIRS, "responses={path: x}", "there is a section rollouts as well"),
        (PAIRS, "training.tokens_per_device=512", "gives rounds, whose rows are taken"),
        (PAIRS, "reference=cached", "samples from the policy as it trains"),
        (WIN_RATES, "objective={kind: sppo, beta: 0.1}", "does not read the advantage of a pair"),
        (
            PAIRS,
            "objective={kind: margin_regression, beta: 0.1}",
            "margin_regression needs a target .* rollouts.targets=true",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, settings, change, message):
    kept = [s for s in settings if not s.startswith(change.partition("=")[0])]
    questions = write_questions(tmp_path)
    path = [] if "sd15" in change else [f"model.path={model()}"]
    run = config.load(
        RunConfig,
        None,
        [*kept, *path, change, f"rollouts.questions.path={questions}", f"output={tmp_path}"],
    )
    with pytest.raises(ConfigError, match=message):
        train.run(run)
