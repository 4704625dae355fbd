"""D3PO through the train job: with a scorer and with people, killed in every phase, in parallel."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign import config
from diffalign.errors import DataError
from diffalign.jobs import generate, train
from diffalign.rollouts.groups import read_groups
from diffalign.training.config import RunConfig
from tests.jobs.killing import kill_when, step_reached
from tests.processes import run_ranks
from tests.runs import figures

LEARNING = (
    "model.kind=sd15",
    "model.lora.rank=2",
    "likelihood.kind=transition",
    "likelihood.process={steps: 3, guidance: 2}",
    "objective.kind=clipped_dpo",
    "objective.beta=0.1",
    "optimizer.lr=1e-3",
    "training.optimizer_steps=2",
    "training.samples_per_device=2",
    "training.accumulation=3",
    "training.log_every=1",
)
JUDGED = (
    *LEARNING,
    "rollouts.kind=d3po",
    "rollouts.prompts.texts=[a cat, a dog, an owl, a bat, fog]",
    "rollouts.scorers=[{kind: tests.comparison.brightness}]",
    "rollouts.prompts_per_round=4",
    "rollouts.prompts_per_batch=2",
    "rollouts.previewed_prompts=1",
)


def load(settings: tuple[str, ...], model: Path, output: Path, *more: str) -> RunConfig:
    return config.load(
        RunConfig, None, [*settings, f"model.path={model}", f"output={output}", *more]
    )


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{step}/weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["lora", "full"])
@pytest.mark.parametrize("folder", ["sd15", "sd15_v", "sdxl", "sdxl_v"])
def test_two_steps_on_every_backbone(request, tmp_path, folder, shape):
    more = [f"model.kind={folder.removesuffix('_v')}"]
    more += ["model.lora=null"] if shape == "full" else []
    model = request.getfixturevalue(f"tiny_{folder}")
    final = train.run(load(JUDGED, model, tmp_path / "run", *more))
    rows = figures(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(row["grad_norm"] > 0 and math.isfinite(row["grad_norm"]) for row in rows)
    assert rows[1]["abs_log_ratio"] > 0
    assert any(final.rglob("*.safetensors"))


def test_people_rank_what_each_round_generates(tmp_path, tiny_sd15):
    """Groups, a file of preferences, an adapter; then the same again from that adapter."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    model, more = tiny_sd15, []
    for number in range(2):
        groups, run = tmp_path / f"groups-{number}", tmp_path / f"run-{number}"
        generate.run(
            config.load(
                generate.GenerateConfig,
                None,
                [
                    f"models.policy={model}",
                    f"prompts={prompts}",
                    f"output={groups}",
                    "trajectories={images_per_group: 3, process: {steps: 3, guidance: 2}}",
                ],
            )
        )
        said = [{"group": group.group, "ranking": [2, 0, 1]} for group in read_groups(groups)]
        preferences = tmp_path / f"preferences-{number}.jsonl"
        preferences.write_text("".join(json.dumps(row) + "\n" for row in said))
        feedback = (
            *LEARNING,
            "rollouts.kind=human_feedback",
            f"rollouts.trajectories={groups}",
            f"rollouts.preferences={preferences}",
            "optimizer.lr=1e-2",
            *more,
        )
        train.run(load(feedback, tiny_sd15, run))
        rows = figures(run)
        assert rows[0]["loss"] == pytest.approx(
            math.log(2), abs=1e-6
        )  # the policy that generated them
        assert rows[1]["abs_log_ratio"] > 0
        if number == 1:
            from_the_base = load((*feedback, "model.lora.start=null"), tiny_sd15, tmp_path / "x")
            with pytest.raises(DataError, match="was sampled by another model"):
                train.run(from_the_base)
        model, more = run, [f"model.lora.start={run}"]


def started(folder: Path, whole: int) -> bool:
    """Whether a folder has some of its files and not all."""
    return 0 < len([*folder.glob("*.safetensors"), *folder.glob("*.jsonl")]) < whole


def writing(folder: Path) -> bool:
    return (folder / "scores.jsonl").exists() and not (folder / "round.json").exists()


@pytest.mark.slow
def test_a_run_killed_in_every_phase_and_resumed_ends_bit_for_bit_alike(tmp_path, tiny_sd15):
    long = (
        "training.optimizer_steps=9",  # round 0 has 6, and round 1 is left in its middle
        "training.checkpoint_every=2",
        "rollouts.prompts_per_round=12",
        "rollouts.prompts_per_batch=1",
        "rollouts.scorers=[{kind: tests.rollouts.slow_brightness}]",
        "rollouts.reference=latest",
        "model.lora.dropout=0.1",
    )
    train.run(load(JUDGED, tiny_sd15, tmp_path / "whole", *long))

    output = tmp_path / "killed"
    run = load(JUDGED, tiny_sd15, output, *long)
    config.save(run, tmp_path / "killed.yaml")

    first_round = output / "rounds/round-0000"
    moments = {
        "sampling": partial(started, first_round / "latents", 12),
        "scoring": partial(started, first_round / "scores", 12),
        "writing": partial(writing, first_round),
        "training": partial(step_reached, output, 3),
    }
    for number, moment in enumerate(moments.values()):
        kill_when(tmp_path / "killed.yaml", moment, resume=number > 0)
    train.run(run, resume=output)

    assert figures(output) == figures(tmp_path / "whole")
    for name in ("weights", "optimizer"):
        ours, theirs = (
            load_file(folder / f"checkpoint-9/{name}.safetensors")
            for folder in (output, tmp_path / "whole")
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("scores.jsonl", "pairs.jsonl", "grid.png", "images/0000-0.png"):
        for number in range(2):
            first, second = (
                folder / f"rounds/round-{number:04d}" / name
                for folder in (output, tmp_path / "whole")
            )
            assert first.read_bytes() == second.read_bytes()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute as a process that was told OMP_NUM_THREADS=1: sums round by how they are divided."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.multiprocess
def test_one_process_and_two_sample_score_and_train_alike(tmp_path, tiny_sd15, one_thread):
    more = (
        "training.optimizer_steps=4",  # one in the second round
        "rollouts.prompts_per_round=12",
        "training.checkpoint_every=1",
        "training.keep_checkpoints=9",
    )
    train.run(load(JUDGED, tiny_sd15, tmp_path / "one", *more, "training.samples_per_device=4"))
    config.save(load(JUDGED, tiny_sd15, tmp_path / "two", *more), tmp_path / "two.yaml")
    run_ranks("train", str(tmp_path / "two.yaml"), log=tmp_path / "log")
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("scores.jsonl", "pairs.jsonl"):
        first, second = (folder / "rounds/round-0000" / name for folder in (one, two))
        assert first.read_bytes() == second.read_bytes()
    for ours, theirs in zip(figures(one), figures(two), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    start, first, second = weights(one, 1), weights(one, 4), weights(two, 4)
    moved = sum(float((first[name] - start[name]).square().sum()) for name in first)
    apart = sum(float((first[name] - second[name]).square().sum()) for name in first)
    assert moved > 0
    assert apart < 1e-3 * moved
