"""SPO through the train job: every backbone, and killed while it samples and while it trains."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign import config
from diffalign.jobs import train
from diffalign.training.config import RunConfig
from tests.jobs.killing import kill_when, step_reached
from tests.runs import figures

SETTINGS = (
    "model.kind=sd15",
    "model.lora.rank=2",
    "rollouts.kind=spo",
    "rollouts.prompts.texts=[a cat, a dog, an owl, a bat, fog]",
    "rollouts.scorer.kind=tests.rollouts.noisy_brightness",
    "rollouts.prompts_per_round=4",
    "rollouts.prompts_per_batch=1",
    "rollouts.candidates=2",
    "rollouts.first_step=1",
    "rollouts.threshold=0",
    "rollouts.rendered_prompts=1",
    "rollouts.previewed_prompts=1",
    "likelihood.kind=transition",
    "likelihood.process.steps=4",
    "objective.kind=clipped_dpo",
    "objective.beta=10",
    "optimizer.lr=1e-3",
    "training.optimizer_steps=2",
    "training.samples_per_device=2",
    "training.log_every=1",
)


def load(model: Path, output: Path, *more: str) -> RunConfig:
    return config.load(
        RunConfig, None, [*SETTINGS, f"model.path={model}", f"output={output}", *more]
    )


def checkpoint(output: Path, step: int) -> dict[str, torch.Tensor]:
    folder = output / f"checkpoint-{step}"
    return load_file(folder / "weights.safetensors") | load_file(folder / "optimizer.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sd15", "sdxl"])
@pytest.mark.parametrize("shape", ["lora", "full"])
@pytest.mark.parametrize("folder", ["sd15", "sd15_v", "sdxl", "sdxl_v"])
def test_two_steps_of_both_variants_on_every_backbone(request, tmp_path, folder, shape, variant):
    more = [f"model.kind={folder.removesuffix('_v')}"]
    more += ["model.lora=null"] if shape == "full" else []
    more += ["rollouts.steps_per_segment=3"] if variant == "sdxl" else []
    run = load(request.getfixturevalue(f"tiny_{folder}"), tmp_path / "run", *more)
    final = train.run(run)
    rows = figures(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(row["grad_norm"] > 0 and math.isfinite(row["grad_norm"]) for row in rows)
    assert rows[1]["abs_log_ratio"] > 0
    assert any(final.rglob("*.safetensors"))
    comparisons = (tmp_path / "run/rounds/round-0000/scores.jsonl").read_text().splitlines()
    assert len(comparisons) == 4 * (3 if variant == "sd15" else 1)


def sampling(folder: Path) -> bool:
    """Whether a round has started and not ended."""
    return any(folder.glob("batches/*.json")) and not (folder / "round.json").exists()


@pytest.mark.slow
def test_a_run_killed_in_every_phase_and_resumed_ends_bit_for_bit_alike(tmp_path, tiny_sd15):
    long = (
        "training.optimizer_steps=9",  # round 0 has 6, and round 1 is left in its middle
        "training.checkpoint_every=2",
        "rollouts.prompts_per_round=8",
        "training.samples_per_device=4",
        "model.lora.dropout=0.1",
        "rollouts.reference=latest",
    )
    train.run(load(tiny_sd15, tmp_path / "whole", *long))

    output = tmp_path / "killed"
    run = load(tiny_sd15, output, *long)
    config.save(run, tmp_path / "killed.yaml")

    moments = [
        partial(sampling, output / "rounds/round-0000"),
        partial(step_reached, output, 3),
        partial(sampling, output / "rounds/round-0001"),
    ]
    for number, moment in enumerate(moments):
        kill_when(tmp_path / "killed.yaml", moment, resume=number > 0)
    train.run(run, resume=output)

    assert figures(output) == figures(tmp_path / "whole")
    ours, theirs = checkpoint(output, 9), checkpoint(tmp_path / "whole", 9)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("round-0000/scores.jsonl", "round-0001/scores.jsonl", "preview_strip.png"):
        first, second = (folder / "rounds" / name for folder in (output, tmp_path / "whole"))
        assert first.read_bytes() == second.read_bytes()
