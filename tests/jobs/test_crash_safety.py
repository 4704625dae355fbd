"""What happens to a run when a disk, another process or the system interferes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign import config, world
from diffalign.data.pairs.samples import SampleMaker
from diffalign.errors import BusyError, CheckpointError, DataError
from diffalign.jobs import train
from diffalign.processes import only_writer
from diffalign.training import checkpoint
from diffalign.training.config import RunConfig
from diffalign.training.hooks import records
from tests import layouts
from tests.runs import figures, files

SMOKE = Path(__file__).parents[2] / "configs/smoke/diffusion_dpo_sdxl.yaml"


@pytest.fixture(scope="module")
def load(tiny_sdxl, tmp_path_factory):
    """Makes runs of six steps with a checkpoint every two."""
    data = layouts.write_pickapic(tmp_path_factory.mktemp("data"), layouts.make_pairs(6))

    def load(output: Path, *more: str) -> RunConfig:
        places = [f"model.path={tiny_sdxl}", f"data.path={data}", f"output={output}"]
        settings = ["data.resolution=32", "optimizer.lr=1e-3", "training.samples_per_device=2"]
        steps = ["optimizer_steps=6", "checkpoint_every=2", "keep_checkpoints=3", "log_every=1"]
        settings += [f"training.{step}" for step in steps]
        return config.load(RunConfig, SMOKE, [*places, *settings, *more])

    return load


@pytest.fixture(scope="module")
def whole(load, tmp_path_factory) -> Path:
    """A run that nothing interfered with."""
    run = load(tmp_path_factory.mktemp("runs") / "whole")
    train.run(run)
    return run.output


@pytest.fixture
def ended(load, whole, tmp_path) -> RunConfig:
    """The same with its end to come: resumed, it does steps 5 and 6 again."""
    shutil.copytree(whole, tmp_path / "run")
    return load(tmp_path / "run")


def damage(folder: Path) -> None:
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoint-6/weights.safetensors")


def test_a_resume_passes_over_damaged_checkpoints_says_so_and_ends_alike(ended, whole, capsys):
    output = ended.output
    damage(output / "checkpoint-6")
    (output / "checkpoint-4/state.json").write_text("{")
    (output / "checkpoint-abc").mkdir()
    metrics = output / "metrics.jsonl"
    metrics.write_bytes(b"\x00\xff rubbish\n[1]\n" + metrics.read_bytes() + b'{"step": 7, "lo')
    with (output / "skipped.jsonl").open("wb") as file:
        file.write(b'not json\n{"no": "id"}\n[]\n')
    train.run(ended, resume=output)
    said = capsys.readouterr().out
    assert "checkpoint-6: the checkpoint is damaged: weights.safetensors has changed" in said
    assert "checkpoint-4: the checkpoint is damaged: state.json cannot be read" in said
    assert "checkpoint-abc is not called" in said
    assert f"Resumed from {output / 'checkpoint-2'} at step 2" in said
    assert "metrics.jsonl was damaged: 2 lines that are no rows are dropped" in said
    assert figures(output) == figures(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(output).items())
    names = [path.name for path in checkpoint.checkpoints_in(output)]
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert checkpoint.starting_point(output).path == output / "checkpoint-6"


def test_where_no_checkpoint_is_good_a_resume_is_refused_and_changes_nothing(ended):
    output = ended.output
    for path in checkpoint.checkpoints_in(output):
        damage(path)
    before = files(output)
    with pytest.raises(CheckpointError, match=r"no checkpoint of this run can be used"):
        train.run(ended, resume=output)
    assert files(output) == before


def test_a_checkpoint_that_was_asked_for_and_is_damaged_is_refused_and_another_named(ended):
    damage(ended.output / "checkpoint-4")
    with pytest.raises(CheckpointError, match=r"checkpoint-4: .*; resume from .*checkpoint-6 inst"):
        train.run(ended, resume=ended.output / "checkpoint-4")
    with pytest.raises(CheckpointError, match=r"checkpoint-5: not a checkpoint: it has no state"):
        train.run(ended, resume=ended.output / "checkpoint-5")


def test_a_state_that_is_whole_and_no_state_of_this_run_is_a_sentence(ended):
    path = ended.output / "checkpoint-6"
    saved = checkpoint.load_checkpoint(path)
    odd = checkpoint.Checkpoint(
        step=6, tensors=saved.tensors, state={**saved.state, "schedule": {"odd": 1}}
    )
    del odd.state["source"]["pairs_per_micro_batch"]
    checkpoint.save_checkpoint(ended.output, odd, keep=9)
    with pytest.raises(CheckpointError, match=r"step 6 does not fit this run \(KeyError"):
        train.run(ended, resume=ended.output)


def test_two_runs_in_one_folder_do_not_meet(load, tmp_path):
    output = tmp_path / "run"
    with only_writer(output):
        with pytest.raises(BusyError, match=f"in use.*process {os.getpid()} "):
            train.run(load(output))
        train.run(load(output), dry_run=True)
        train.run(load(tmp_path / "other"))
    assert not output.exists(), "nobody wrote there"


def test_a_dry_run_says_that_its_folder_cannot_be_written_and_leaves_none(load, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/run: cannot be written \(Not a directory\)"):
        train.run(load(tmp_path / "file/run"), dry_run=True)
    train.run(load(tmp_path / "new/run"), dry_run=True)
    assert not (tmp_path / "new").exists()


def test_a_run_that_cannot_save_stops_at_its_first_checkpoint(load, tmp_path, monkeypatch):
    def save_file(tensors, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    run = load(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"checkpoint-2: .*could not be written .*No space"):
        train.run(run)
    assert figures(run.output)[-1]["step"] == 2


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_figures_only(
    load, whole, tmp_path, monkeypatch, capsys
):
    actual = checkpoint.save_file
    append = records.JsonLines.write

    def save_file(tensors, path):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        actual(tensors, path)

    def write(self, row):
        if row["step"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, row)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    monkeypatch.setattr(records.JsonLines, "write", write)
    run = load(tmp_path / "run")
    train.run(run)
    said = capsys.readouterr().out
    assert "figures of step 4 could not be written ([Errno 28] No space" in said
    assert "checkpoint-2 is left as it was" in said and "The run goes on" in said
    names = [path.name for path in checkpoint.checkpoints_in(run.output)]
    assert names == ["checkpoint-2", "checkpoint-6"]
    ours, theirs = weights(run.output), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(
    load, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(train.build, "build_source", None)
    with pytest.raises(DataError, match=r"cannot be written \(Not a directory\)"):
        train.run(load(tmp_path / "file/run"))


def test_a_disk_without_room_is_told_before_the_first_step(load, tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(CheckpointError, match=r"it could never be saved. Make room"):
        train.run(load(tmp_path / "run"))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_worker_that_the_system_kills_is_a_sentence_about_memory(load, tmp_path, monkeypatch):
    trainer_process = os.getpid()
    make = SampleMaker.make

    def killed(self, *arguments):
        if os.getpid() != trainer_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, *arguments)

    monkeypatch.setattr(SampleMaker, "make", killed)
    with pytest.raises(DataError, match=r"memory runs out: lower data\.workers .*--resume"):
        train.run(load(tmp_path / "run", "data.workers=1"))


def test_a_run_whose_worker_was_killed_goes_on_to_the_same_weights(
    load, whole, tmp_path, monkeypatch
):
    trainer_process, made = os.getpid(), itertools.count()
    make = SampleMaker.make

    def killed(self, *arguments):
        if os.getpid() != trainer_process and next(made) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, *arguments)

    run = load(tmp_path / "run", "data.workers=1", "training.checkpoint_every=1")
    with monkeypatch.context() as patch:
        patch.setattr(SampleMaker, "make", killed)
        with pytest.raises(DataError, match=r"a process that prepares batches ended"):
            train.run(run)
    train.run(run, resume=run.output)
    assert figures(run.output) == figures(whole)
    ours, theirs = weights(run.output), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("when", [0.0, 4e9])
def test_a_clock_that_was_moved_changes_nothing(ended, whole, when, monkeypatch):
    shutil.rmtree(ended.output / "checkpoint-6")
    for path in ended.output.rglob("*"):
        os.utime(path, (when, 4e9 - when))
    monkeypatch.setattr(time, "time", lambda: when)
    train.run(ended, resume=ended.output)
    assert figures(ended.output) == figures(whole)
    ours, theirs = weights(ended.output), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_package_asks_for_the_time_of_day_only_to_tell_it():
    asks = re.compile(r"time\.time\(|st_[amc]time|getmtime|\.now\b|utcnow|time_ns")
    package = Path(train.__file__).parents[1]
    found = {path.name for path in package.rglob("*.py") if asks.search(path.read_text())}
    assert found <= {"processes.py", "heartbeat.py"}, "nothing may depend on a clock that moves"


def test_what_the_main_rank_refuses_ends_the_others_without_a_word(monkeypatch):
    def refuse() -> None:
        raise BusyError("no")

    with pytest.raises(BusyError):
        world.decided(refuse)
    monkeypatch.setattr(world, "is_main", lambda: False)
    monkeypatch.setattr(world, "gather", lambda value: [(None, True), value])
    with pytest.raises(SystemExit) as ended:
        world.decided(refuse)
    assert ended.value.code == 1
    monkeypatch.setattr(world, "gather", lambda value: [("theirs", False), value])
    assert world.decided(refuse) == "theirs"


def test_what_a_holder_says_of_itself_is_gone_after_the_run(whole):
    assert not (whole / ".holder.json").exists()
    assert json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
