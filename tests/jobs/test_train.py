"""The train job whole: every reader and backbone; killed, resumed, in parallel."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from diffalign import config
from diffalign.errors import CheckpointError, ConfigError, DataError
from diffalign.jobs import train
from diffalign.models.adapter_files import ADAPTER_FILE
from diffalign.playground.models import playground_model_path, playground_preferences_path
from diffalign.training.config import RunConfig
from tests import layouts
from tests.jobs.killing import kill_when, step_reached
from tests.processes import ended, started, wait_until
from tests.runs import figures

LAYOUTS = {
    "pickapic": layouts.write_pickapic,
    "parquet": layouts.write_parquet,
    "webdataset": layouts.write_webdataset,
    "folder": layouts.write_folder,
    "jsonl": layouts.write_jsonl,
}
SMOKE = Path(__file__).parents[2] / "configs/smoke/diffusion_dpo_sdxl.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Twelve pairs in every layout."""
    root = tmp_path_factory.mktemp("data")
    pairs = layouts.make_pairs(12)
    folders = {name: root / name for name in LAYOUTS}
    for name, write in LAYOUTS.items():
        write(folders[name], pairs)
    return folders


def settings(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        f"model.path={model}",
        f"data.path={data}",
        f"output={output}",
        "data.resolution=32",
        *more,
    ]


def load(*overrides: str) -> RunConfig:
    return config.load(RunConfig, SMOKE, list(overrides))


def trained(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{step}" / "weights.safetensors")


def image(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "a red thing", num_inference_steps=2, generator=generator, output_type="pt"
    ).images[0]


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["lora", "full"])
@pytest.mark.parametrize(
    ("kind", "folder"),
    [("sd15", "sd15"), ("sd15", "sd15_v"), ("sdxl", "sdxl"), ("sdxl", "sdxl_v")],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_steps_from_every_reader(request, tmp_path, data, layout, kind, folder, shape):
    model = request.getfixturevalue(f"tiny_{folder}")
    more = [f"model.kind={kind}", "optimizer.lr=1e-2"]
    more += ["model.lora=null"] if shape == "full" else []
    final = train.run(load(*settings(model, data[layout], tmp_path / "run", *more)))
    assert [row["step"] for row in figures(tmp_path / "run")] == [1, 2]
    assert figures(tmp_path / "run")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)

    if layout != "pickapic":
        return  # what is exported does not depend on the reader
    pipeline_class = getattr(
        diffusers, {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[kind]
    )
    parts = {"safety_checker": None} if kind == "sd15" else {}
    base = pipeline_class.from_pretrained(model, **parts)
    before = image(base)
    if shape == "lora":
        base.load_lora_weights(final, weight_name=ADAPTER_FILE)
        after = image(base)
    else:
        after = image(pipeline_class.from_pretrained(final, **parts))
    assert not torch.allclose(before, after, atol=1e-3)


def test_the_same_config_twice_gives_identical_numbers_and_weights(tmp_path, tiny_sdxl, data):
    for name in ("a", "b"):
        train.run(load(*settings(tiny_sdxl, data["pickapic"], tmp_path / name)))
    assert figures(tmp_path / "a") == figures(tmp_path / "b")
    first, second = trained(tmp_path / "a", 2), trained(tmp_path / "b", 2)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("model.lora=null",),
        ("data.streaming=true", "data.shuffle_block=5"),
        ("training.accumulation=2", "training.samples_per_device=2"),
        ("training.precision=bf16",),
        ("optimizer.kind=adafactor", "optimizer.schedule=cosine"),
    ],
    ids=lambda more: more[0],
)
def test_a_run_resumed_from_its_middle_ends_bit_for_bit_alike(tmp_path, tiny_sdxl, data, more):
    steps = ("training.optimizer_steps=4", "training.checkpoint_every=2")
    keep = ("training.keep_checkpoints=9", "optimizer.lr=1e-3")
    overrides = settings(tiny_sdxl, data["pickapic"], tmp_path / "run", *steps, *keep, *more)
    train.run(load(*overrides))
    before, rows = trained(tmp_path / "run", 4), figures(tmp_path / "run")
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert rows[-1]["loss"] != rows[0]["loss"]
    train.run(load(*overrides), resume=tmp_path / "run/checkpoint-2")
    after = trained(tmp_path / "run", 4)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert figures(tmp_path / "run") == rows


def test_figures_reach_tensorboard(tmp_path, tiny_sdxl, data):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = settings(tiny_sdxl, data["pickapic"], tmp_path / "run")
    train.run(load(*overrides, "tracking.trackers=[tensorboard]"))
    losses = []
    for events in (tmp_path / "run").rglob("events.out.tfevents.*"):
        read = EventAccumulator(str(events)).Reload()
        if "loss" in read.Tags()["scalars"]:
            losses = [event.value for event in read.Scalars("loss")]
    assert losses == pytest.approx([row["loss"] for row in figures(tmp_path / "run")])


LONG = (
    "training.optimizer_steps=9",
    "training.checkpoint_every=2",
    "training.log_every=2",
    "training.ema_decay=0.9",
    "model.lora.dropout=0.1",
    "data.workers=1",
)


@pytest.mark.slow
def test_a_run_killed_at_three_steps_and_resumed_ends_bit_for_bit_alike(tmp_path, tiny_sdxl, data):
    whole = settings(tiny_sdxl, data["pickapic"], tmp_path / "whole", *LONG)
    train.run(load(*whole))
    output = tmp_path / "killed"
    run = load(*settings(tiny_sdxl, data["pickapic"], output, *LONG))
    config.save(run, tmp_path / "killed.yaml")
    for step in (2, 4, 8):
        moment = partial(step_reached, output, step)
        kill_when(tmp_path / "killed.yaml", moment, resume=step > 2)
    train.run(run, resume=output)
    assert figures(output) == figures(tmp_path / "whole")
    for name in ("weights", "average", "optimizer"):
        ours = load_file(output / "checkpoint-9" / f"{name}.safetensors")
        theirs = load_file(tmp_path / "whole/checkpoint-9" / f"{name}.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_process_and_two_agree(tmp_path, python):
    # The same global batch in the same local shapes, since float32 kernels round by shape and beta
    # multiplies that: 2 pairs twice on one process, or once on each of two.
    more = ("training.optimizer_steps=4", "training.samples_per_device=2")
    more += (f"model.path={playground_model_path()}", f"data.path={playground_preferences_path()}")
    train.run(load(f"output={tmp_path / 'one'}", *more, "training.accumulation=2"))
    both = (f"output={tmp_path / 'two'}", *more)
    subprocess.run(
        [python, "-m", "diffalign", "train", str(SMOKE), *both, "--processes", "2"],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for ours, theirs in zip(figures(tmp_path / "one"), figures(tmp_path / "two"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    first, second = trained(tmp_path / "one", 4), trained(tmp_path / "two", 4)
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_sigterm_saves_says_how_to_go_on_and_exits_with_zero(tmp_path, tiny_sdxl, data):
    output = tmp_path / "run"
    overrides = settings(tiny_sdxl, data["pickapic"], output, "training.optimizer_steps=100000")
    log = tmp_path / "log"
    with started("train", str(SMOKE), *overrides, log=log) as process:
        wait_until((output / "metrics.jsonl").exists, process, log)
        os.kill(process.pid, signal.SIGTERM)
        status = ended(process, log)
    text = log.read_text()
    assert status == 0, text
    assert f"diffalign train {output / 'config.yaml'} --resume" in text.replace("\n", "")
    steps = [int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")]
    assert steps == [figures(output)[-1]["step"]]


def test_a_dry_run_shows_the_first_rows_and_writes_nothing(tmp_path, tiny_sdxl, data, capsys):
    assert (
        train.run(load(*settings(tiny_sdxl, data["pickapic"], tmp_path / "run")), dry_run=True)
        is None
    )
    text = capsys.readouterr().out
    assert "4 samples per step = 4 per device x 1 accumulated x 1 processes" in text
    assert "a red thing, number" in text
    assert "Salesforce beta_dpo 2000" in text
    assert "All checks passed" in text
    assert not (tmp_path / "run").exists()


def test_the_resolved_config_of_a_run_repeats_it(tmp_path, tiny_sdxl, data):
    output = tmp_path / "run"
    train.run(load(*settings(tiny_sdxl, data["pickapic"], output)))
    saved = config.load(RunConfig, output / "config.yaml")
    assert saved == load(*settings(tiny_sdxl, data["pickapic"], output))
    card = (output / "README.md").read_text()
    assert "library_name: diffusers" in card and "beta 2000" in card


def test_training_over_an_existing_run_is_refused(tmp_path, tiny_sdxl, data):
    overrides = settings(tiny_sdxl, data["pickapic"], tmp_path / "run")
    train.run(load(*overrides))
    with pytest.raises(ConfigError, match=r"already holds a run with checkpoint-2.*--resume"):
        train.run(load(*overrides))


def test_resuming_from_another_runs_checkpoint_is_refused(tmp_path, tiny_sdxl, data):
    overrides = settings(tiny_sdxl, data["pickapic"], tmp_path / "run")
    train.run(load(*overrides))
    config_before = (tmp_path / "run/config.yaml").read_bytes()
    other = load(*overrides, "objective.beta=500")
    with pytest.raises(CheckpointError, match=r"another run: objective\.beta was 2000\.0"):
        train.run(other, resume=tmp_path / "run/checkpoint-2")
    assert (tmp_path / "run/config.yaml").read_bytes() == config_before


def test_moved_data_resumes_and_other_data_is_refused(tmp_path, tiny_sdxl, data):
    moved = tmp_path / "moved"
    shutil.copytree(data["pickapic"], moved)
    keep = ("training.checkpoint_every=1", "training.keep_checkpoints=9")
    train.run(load(*settings(tiny_sdxl, data["pickapic"], tmp_path / "run", *keep)))
    before = trained(tmp_path / "run", 2)
    start = tmp_path / "run/checkpoint-1"
    train.run(load(*settings(tiny_sdxl, moved, tmp_path / "run", *keep)), resume=start)
    assert all(
        torch.equal(before[name], value) for name, value in trained(tmp_path / "run", 2).items()
    )
    other = layouts.write_pickapic(tmp_path / "other", layouts.make_pairs(9))
    with pytest.raises(CheckpointError, match=r"another run: data\.fingerprint was"):
        train.run(load(*settings(tiny_sdxl, other, tmp_path / "run", *keep)), resume=start)


def test_a_repaired_data_set_trains_into_the_same_folder(tmp_path, tiny_sdxl):
    pairs = layouts.make_pairs(6)
    broken = [dataclasses.replace(pair, chosen=b"rubbish") for pair in pairs[:3]]
    layouts.write_pickapic(tmp_path / "data", [*broken, *pairs[3:]])
    overrides = settings(tiny_sdxl, tmp_path / "data", tmp_path / "run")
    with pytest.raises(DataError, match=r"cannot be used, more than data\.max_bad_fraction"):
        train.run(load(*overrides))
    assert (tmp_path / "run/skipped.jsonl").exists()
    shutil.rmtree(tmp_path / "data")
    layouts.write_pickapic(tmp_path / "data", pairs)
    train.run(load(*overrides))
    assert len(figures(tmp_path / "run")) == 2


def test_resuming_another_models_checkpoint_is_refused(tmp_path, tiny_sdxl, tiny_sdxl_v, data):
    train.run(load(*settings(tiny_sdxl, data["pickapic"], tmp_path / "run")))
    other = load(*settings(tiny_sdxl_v, data["pickapic"], tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"another run: model\.fingerprint was"):
        train.run(other, resume=tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reference=none", "reference is none, but the objective dpo compares"),
        ("model.lora=null reference=adapter_off", "reference is adapter_off, but model.lora is"),
        (
            "optimizer.warmup_steps=2",
            r"the peak learning rate would never be reached.*: optimizer\.warmup_steps=0$",
        ),
        ("tracking.trackers=[wandb]", r"pip install 'diffalign\[wandb\]'"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(
    tmp_path, tiny_sdxl, data, override, message, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    overrides = settings(tiny_sdxl, data["pickapic"], tmp_path / "run", *override.split())
    with pytest.raises(ConfigError, match=message):
        train.run(load(*overrides))
    assert not (tmp_path / "run").exists()


def test_a_run_says_how_much_memory_it_took_and_not_what_started_it(monkeypatch):
    inherited = SimpleNamespace(ru_maxrss=1 << 40)  # as Linux has it of a process's parent
    monkeypatch.setattr(train.resource, "getrusage", lambda _: inherited)
    said = train.peak_memory(torch.device("cpu"))
    assert 0.1 < float(said.removeprefix("Peak memory: ").split()[0]) < 64
    assert said.endswith("GiB of this process")
