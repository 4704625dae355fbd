"""Configs of the offline objectives, two optimiser steps of each on tiny models and data.

Settings that cost time or memory are made small; objective and likelihood are those of the file.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign import config
from diffalign.jobs import train
from diffalign.training.config import RunConfig
from tests.judged_responses import write_judged_responses
from tests.layouts import make_pairs, solid_image, write_jsonl, write_parquet
from tests.runs import figures
from tests.tiny_vlm import tiny_llava

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    "model.revision=null",
    "optimizer.lr=1e-2",
    "optimizer.warmup_steps=0",
    "training.optimizer_steps=2",
    "training.samples_per_device=2",
    "training.accumulation=2",
    "training.precision=float32",
    "training.log_every=1",
]
LN2 = math.log(2)
IMAGES: dict[str, float | None] = {
    # Loss of the first step, where policy and reference are equal; None where it is an error.
    "diffusion_kto": 0.5,
    "dspo": None,
    "dmpo": -LN2 - (math.log(0.99) + math.log(0.01)) / 2,
    "inpo": LN2,
    "smpo": LN2,
    "capo": None,
    "diffusion_rpo": LN2,
    "two_betas": LN2,
    "rpo": None,
    "mpo": None,
}
RESPONSES: dict[str, float | None] = {
    "aot": LN2,
    "discopop": (LN2 + 1) / 2,
    "wpo": None,
    "rpo": None,
    "mpo": None,
}


def of(method: str, backbone: str, *settings: str) -> RunConfig:
    return config.load(RunConfig, CONFIGS / f"{method}/{backbone}.yaml", [*SMALL, *settings])


def check(run: RunConfig, start: float | None) -> list[dict]:
    """Two steps that move the weights; the first loss is the one that is known."""
    final = train.run(run)
    rows = figures(run.output)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert start is None or rows[0]["loss"] == pytest.approx(start, abs=1e-5)
    changed = load_file(next(final.glob("*.safetensors")))
    assert any(value.any() for name, value in changed.items() if "lora_B" in name)
    return rows


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Path]:
    """Eight pairs: plain ones, ones with votes, and groups of three images with scores."""
    root = tmp_path_factory.mktemp("offline")
    different = [replace(pair, caption=f"{i} things") for i, pair in enumerate(make_pairs(8))]
    write_jsonl(root / "plain", different)
    write_parquet(root / "votes", make_pairs(8))
    groups = root / "groups"
    groups.mkdir()
    lines = []
    for row in range(8):
        names = [f"{row}-{number}.png" for number in range(3)]
        for number, name in enumerate(names):
            solid_image((60 * number + 10, 10 * row, 0)).save(groups / name)
        scores = [1.0, 0.1 * row, -0.3]
        lines.append(json.dumps({"prompt": "red", "images": names, "scores": scores}))
    (groups / "groups.jsonl").write_text("\n".join(lines))
    return {"smpo": root / "votes", "capo": groups / "groups.jsonl", "others": root / "plain"}


def image_run(method: str, tiny_sd15: Path, pairs: dict[str, Path], output: Path, *more: str):
    return of(
        method,
        "sd15",
        f"output={output}",
        f"model.path={tiny_sd15}",
        "model.lora={rank: 2}",
        f"data.path={pairs.get(method, pairs['others'])}",
        "data.split=train",
        "data.streaming=false",
        "data.resolution=32",
        "data.workers=0",
        *more,
    )


@pytest.mark.parametrize("method", IMAGES)
def test_two_steps_of_every_method_of_images(method, tmp_path, tiny_sd15, pairs):
    run = image_run(method, tiny_sd15, pairs, tmp_path / "run")
    rows = check(run, IMAGES[method])
    if method == "smpo":  # three votes to one
        assert rows[0]["preference"] == pytest.approx(2 / 3)
    if method == "capo":
        gap = [torch.tensor([1.0, 0.1 * row, -0.3]) for row in range(8)]
        rates = [torch.sigmoid(s[:, None] - s).sum(dim=1) - 0.5 for s in gap]
        targets = [((rate[0] - rate[2]) / 2).item() for rate in rates]
        assert min(targets) <= rows[0]["target"] <= max(targets)
        assert rows[0]["accuracy"] == 0.5
    if method == "dspo":
        assert rows[0]["distance"] == 0.0 < rows[1]["distance"]
    if method == "diffusion_rpo":
        assert 0.5 < rows[0]["own_weight"] < 1


@pytest.mark.parametrize("utility", ["loss_averse", "risk_seeking_2"])
def test_a_utility_next_to_a_baseline_of_other_prompts(utility, tmp_path, tiny_sd15, pairs):
    settings = [f"objective.utility={utility}", "objective.baseline=mismatched"]
    settings += ["objective.clamp_baseline=false", "likelihood.mismatched=true"]
    run = image_run("diffusion_kto", tiny_sd15, pairs, tmp_path / "run", *settings)
    rows = check(run, {"loss_averse": 1 + LN2, "risk_seeking_2": 2.0}[utility])
    assert rows[0]["baseline"] == 0.0 != rows[1]["baseline"]
    assert rows[1]["drift/mismatched"] == pytest.approx(rows[1]["baseline"], rel=1e-4)


@pytest.mark.parametrize("method", RESPONSES)
def test_two_steps_of_every_method_of_responses(method, tmp_path):
    for folder in ("model", "responses"):
        (tmp_path / folder).mkdir()
    model = tiny_llava(tmp_path / "model")
    data = write_judged_responses(tmp_path / "responses")
    run = of(
        method,
        "llava15_7b",
        f"output={tmp_path / 'run'}",
        f"model.path={model}",
        "model.lora={rank: 2}",
        "model.gradient_checkpointing=false",
        f"responses.path={data}",
        "responses.kind=tests.judged_responses",
        "responses.workers=0",
    )
    rows = check(run, RESPONSES[method])
    if method == "wpo":
        assert 0 < rows[0]["pair_weight"] <= 1
        assert rows[0]["loss"] < LN2
