"""Sharded training: what it says is what replicas say, and it goes on in any layout."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from packaging.version import Version

from diffalign import config
from diffalign.errors import ConfigError, ModelError
from diffalign.models.runs import RunCheckpoint
from diffalign.training.checkpoint import load_checkpoint
from diffalign.training.checks import check
from diffalign.training.config import RunConfig
from diffalign.training.step_memory import refuse_unplannable
from tests import layouts
from tests.judged_responses import write_judged_responses
from tests.processes import run_ranks
from tests.runs import figures
from tests.tiny_models import write_sd3, write_sd15, write_sdxl
from tests.tiny_vlm import tiny_llava, tiny_qwen2_vl
from tests.training.sharded_ranks import furthest

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


def run_worker(python: str, *arguments: object, processes: int) -> str:
    """What a module of the tests says that runs in each of several processes."""
    ranks = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    found = subprocess.run(
        [python, *ranks, "-m", WORKER, *map(str, arguments)],
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
def test_shards_train_as_replicas_do(tmp_path, models, data, responses, processes, cases, python):
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
    said = run_worker(python, tmp_path / "cases", processes=processes)
    print(said)
    assert said.count("CASE") == len(cases)
    assert said.count("FULL") == processes


SHARDED, REPLICATED = "training.sharding=fsdp2", "training.sharding=none"
LONGER = (FULL, "previews=null", "training.checkpoint_every=2", "training.accumulation=4")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, models, data) -> Path:
    """The config of a run of any length."""
    root = tmp_path_factory.mktemp("runs")
    where = ("model.kind=sd15", f"model.path={models['sd15']}", f"data.path={data}")
    write_case(root, "run", settings_of(SMOKE, *where, *IMAGES, *LONGER))
    return root / "run.yaml"


@pytest.fixture(scope="module")
def whole(run_file) -> Path:
    """Six steps in shards on two processes, never stopped."""
    more = ("training.optimizer_steps=6", SHARDED)
    return train_on(2, run_file, run_file.with_name("whole"), *more)


def train_on(processes: int, file: Path, output: Path, *more: str) -> Path:
    log = output.with_name(f"{output.name}.log")
    run_ranks("train", str(file), f"output={output}", *more, log=log, processes=processes)
    return output


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", [SHARDED, REPLICATED])
def test_a_run_in_shards_goes_on_on_one_process_and_on_four(tmp_path, run_file, whole, kind):
    output = tmp_path / "run"
    train_on(2, run_file, output, "training.optimizer_steps=2", SHARDED)
    with pytest.raises(ModelError, match="each its part, and is read by training alone"):
        RunCheckpoint(output / "checkpoint-2").stored()
    train_on(1, run_file, output, "training.optimizer_steps=4", kind, "--resume")
    train_on(4, run_file, output, "training.optimizer_steps=6", kind, "--resume")
    said = " ".join((tmp_path / "run.log").read_text().split())
    assert "On 1 of them training.accumulation is 8, so that an optimiser step stays 8" in said
    assert "On 4 of them training.accumulation is 2, so that" in said
    ours, theirs = (load_checkpoint(run / "checkpoint-6") for run in (output, whole))
    for group in ("weights", "average", "optimizer"):
        assert furthest(ours.tensors[group], theirs.tensors[group]) < 2e-6, group
    assert ours.state["source"] == theirs.state["source"]
    assert ours.state["identity"] == theirs.state["identity"]
    losses = [[row["loss"] for row in figures(run) if "loss" in row] for run in (output, whole)]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


REFUSED = {
    ("training.sharding=fsdp2",): "an adapter has little to share out.*training.shard_adapter=true",
    ("training.sharding=zero3", FULL): "the sharding of DeepSpeed.*fsdp2 shares out the same",
    (
        "training.sharding=fsdp2",
        FULL,
        "training.sharding_options.cpu_ofload=true",
    ): "cpu_ofload is none of the options.*Did you mean cpu_offload",
    (
        "training.sharding=fsdp2",
        FULL,
        "optimizer={kind: adafactor, lr: 1e-4}",
    ): "optimizer.kind adafactor looks at whole weights.*use adamw",
    ("training.sharding=fsdp2", FULL, "model.channels_last=true"): "model.channels_last works with",
    ("training.sharding_options.cpu_offload=true",): "are those of training.sharding fsdp2.*none",
}


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"), reason="fsdp2 needs torch 2.9, which is said first"
)
@pytest.mark.parametrize("overrides", REFUSED, ids=lambda some: some[0])
def test_what_cannot_be_sharded_is_refused_before_anything_loads(models, data, overrides):
    where = ("output=x", f"model.path={models['sdxl']}", f"data.path={data}")
    with pytest.raises(ConfigError, match=f"(?s){REFUSED[overrides]}"):
        check(config.load(RunConfig, SMOKE, [*where, *overrides]))


def test_memory_is_not_planned_as_if_each_device_held_all(models, data):
    where = ("output=x", f"model.path={models['sdxl']}", f"data.path={data}", FULL, SHARDED)
    with pytest.raises(ConfigError, match=r"sharding is fsdp2.*training.sharding=none, and divide"):
        refuse_unplannable(config.load(RunConfig, SMOKE, [*where]))
