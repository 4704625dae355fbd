"""Sharded training: what it says is what replicas say, and it goes on in any layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from diffalign import config
from diffalign.training.config import RunConfig
from tests import layouts
from tests.judged_responses import write_judged_responses
from tests.tiny_models import write_sd3, write_sd15, write_sdxl
from tests.tiny_vlm import tiny_llava, tiny_qwen2_vl

SMOKE = Path(__file__).parents[2] / "configs/smoke/diffusion_dpo_sdxl.yaml"
WORKER = "tests.training.sharded_ranks"

IMAGES = (
    "data.resolution=32",
    "objective={kind: dpo, beta: 100}",
    "optimizer.lr=1e-4",
    "training.optimizer_steps=4",
    "training.samples_per_device=1",
    "training.accumulation=2",
    "training.log_every=1",
    "training.ema_decay=0.5",
    "data.holdout=0.2",
    "evaluation.every=2",
    "previews={every: 2, prompts: [a red thing], steps: 1}",
)
RESPONSES = """
model: {kind: vlm, path: unset, lora: null}
responses: {path: unset, kind: tests.judged_responses, workers: 0}
likelihood: {kind: tokens}
objective: {kind: dpo, beta: 0.1}
optimizer: {lr: 1.0e-4}
training:
  {optimizer_steps: 4, samples_per_device: 1, accumulation: 2, log_every: 1, ema_decay: 0.5}
"""
FLOW = "likelihood.timesteps={distribution: logit_normal, shift: 3}"
FULL, ADAPTER = "model.lora=null", "training.shard_adapter=true"
IMAGE_CASES = {
    "unet_full": ("sd15", (FULL,)),
    "unet_full_checkpointed": ("sdxl", (FULL, "model.gradient_checkpointing=true")),
    "unet_full_bf16": ("sd15", (FULL, "training.precision=bf16")),
    "unet_lora": ("sdxl", (ADAPTER,)),
    "mmdit_full": ("sd3", (FULL, FLOW)),
    "mmdit_lora": ("sd3", (ADAPTER, FLOW)),
}
RESPONSE_CASES = {
    "vlm_full": ("llava", ()),
    "vlm_full_checkpointed": ("qwen2_vl", ("model.gradient_checkpointing=true",)),
    "vlm_lora": ("llava", ("model.lora={rank: 2}", ADAPTER)),
}
WRITERS = {
    "sd15": write_sd15,
    "sdxl": write_sdxl,
    "sd3": write_sd3,
    "llava": tiny_llava,
    "qwen2_vl": tiny_qwen2_vl,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write(root / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    layouts.write_jsonl(folder, layouts.make_pairs(30))
    return folder


@pytest.fixture(scope="module")
def responses(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("responses")
    write_judged_responses(folder)
    return folder


def write_case(root: Path, name: str, settings: dict) -> None:
    root.mkdir(exist_ok=True)
    (root / f"{name}.yaml").write_text(yaml.safe_dump(settings))


def settings_of(file: Path, *overrides: str) -> dict:
    return config.to_dict(config.load(RunConfig, file, ["output=unset", *overrides]))


def run_worker(*arguments: object, processes: int) -> str:
    """What a module of the tests says that runs in each of several processes."""
    ranks = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    found = subprocess.run(
        [sys.executable, *ranks, "-m", WORKER, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("processes", "cases"),
    [(2, [*IMAGE_CASES, *RESPONSE_CASES]), (4, ["unet_full", "mmdit_full", "vlm_full"])],
)
def test_shards_train_as_replicas_do(tmp_path, models, data, responses, processes, cases):
    for name in cases:
        if name in IMAGE_CASES:
            kind, more = IMAGE_CASES[name]
            where = (f"model.kind={kind}", f"data.path={data}", *IMAGES)
            file = SMOKE
        else:
            kind, more = RESPONSE_CASES[name]
            where = (f"responses.path={responses}",)
            file = tmp_path / "responses.yaml"
            file.write_text(RESPONSES)
        write_case(
            tmp_path / "cases", name, settings_of(file, f"model.path={models[kind]}", *where, *more)
        )
    said = run_worker(tmp_path / "cases", processes=processes)
    print(said)
    assert said.count("CASE") == len(cases)
