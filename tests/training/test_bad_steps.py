"""Steps that are not finite: what they leave behind, and when and how they are told."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from diffalign.errors import TrainingError
from diffalign.training import trainer as trainer_module
from diffalign.training.bad_steps import BadSteps
from tests.training.toys import ToySource, toy_trainer, weights


class WithoutSamples(ToySource):
    """The toy's batches but for those that hold one of some samples."""

    def __init__(self, per_device, left_out):
        super().__init__(per_device)
        self.left_out = {f"toy-{number}" for number in left_out}

    def __iter__(self):
        return (b for b in super().__iter__() if not self.left_out & set(b.sample_ids))


def state_of(trainer):
    """All that a step may move, bit for bit: weights, optimiser, average."""
    inner = trainer.optimizer.optimizer.state_dict()["state"]
    values = {f"optimizer/{n}/{k}": v for n, part in inner.items() for k, v in part.items()}
    average = {} if trainer.average is None else trainer.average.state_dict()
    return {"weights": weights(trainer), **values, **average}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert len(ours) > 4
    return [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def told(trainer):
    """Let it say what it says to a user, without line breaks of a terminal."""
    trainer.console = Console(file=io.StringIO(), width=1000)
    return lambda: trainer.console.file.getvalue()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("bad_step", [1, 3])
def test_a_bad_step_amid_an_interval_changes_nothing_at_all(tmp_path, accumulation, bad_step):
    samples = 4 * accumulation  # of a step; the last one of the bad step is poisoned
    settings = {"accumulation": accumulation, "ema_decay": 0.9, "dropout": 0.0}
    bad = range(samples * (bad_step - 1), samples * bad_step)
    trainer = toy_trainer(
        tmp_path / "bad",
        poisoned=frozenset({bad[-1]}),
        **{"optimizer_steps": 6, "log_every": 6, **settings},
    )
    trainer.fit()
    clean = toy_trainer(tmp_path / "clean", **{"optimizer_steps": 5, "log_every": 5, **settings})
    clean.source = WithoutSamples(4, bad)
    clean.fit()
    assert same(state_of(trainer), state_of(clean))
    ours, theirs = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("bad", "clean")
    )
    assert ours.pop("bad_steps") == 1
    assert theirs.pop("bad_steps") == 0
    for counted in ("step", "samples"):
        assert ours.pop(counted) > theirs.pop(counted)
    assert ours == theirs  # figures of the bad step are not counted


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_host_decides_the_same_for_an_optimiser_that_cannot_skip(
    tmp_path, monkeypatch, ema_decay
):
    settings = {"poisoned": frozenset({9, 17}), "ema_decay": ema_decay, "optimizer_steps": 6}
    device = toy_trainer(tmp_path / "device", **settings)
    device.fit()
    monkeypatch.setattr(trainer_module, "skips_on_device", lambda optimizer: False)
    host = toy_trainer(tmp_path / "host", **settings)
    host.fit()
    assert same(state_of(device), state_of(host))
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("device", "host")]
    assert rows[0] == rows[1]


def test_bad_steps_are_told_at_the_end_of_the_interval_with_their_samples(tmp_path):
    trainer = toy_trainer(
        tmp_path, per_device=6, poisoned=frozenset({7, 13}), optimizer_steps=4, log_every=4
    )
    said = told(trainer)
    after_step = trainer.hooks.after_step
    early = []

    def watched(run, outcome):
        early.append(said())
        return after_step(run, outcome)

    trainer.hooks.after_step = watched
    trainer.fit()
    assert early[:3] == ["", "", ""]
    lines = [line for line in said().splitlines() if "not finite" in line]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 3"]
    assert "(1 in a row, 1 in all; samples toy-6, toy-7, toy-8, toy-9 and 2 more)" in lines[0]
    assert "(2 in a row, 2 in all; samples toy-12, toy-13, toy-14, toy-15 and 2 more)" in lines[1]


def test_a_checkpoint_counts_the_bad_steps_before_it(tmp_path):
    trainer = toy_trainer(
        tmp_path, poisoned=frozenset({5, 9}), optimizer_steps=4, log_every=4, checkpoint_every=3
    )
    trainer.fit()
    resumed = toy_trainer(tmp_path, optimizer_steps=4, log_every=4)
    resumed.resume(tmp_path / "checkpoint-3")
    assert (resumed.bad_steps.in_all, resumed.bad_steps.in_a_row) == (2, 2)


def test_too_many_in_a_row_stop_the_run_although_a_good_step_came_before_they_were_told(tmp_path):
    trainer = toy_trainer(
        tmp_path, poisoned=frozenset({5, 9}), optimizer_steps=8, log_every=4, max_bad_steps=2
    )
    with pytest.raises(TrainingError, match=r"^2 steps in a row .* samples toy-8, toy-9, toy-10"):
        trainer.fit()
    assert trainer.step == 4
    assert not (tmp_path / "metrics.jsonl").exists()


def test_rows_of_good_steps_between_break_the_count():
    found = BadSteps()
    for step, good in enumerate([False, True, False, False], start=1):
        found.note(step, torch.tensor(good), [f"s{step}"])
    read = [(bad.step, bad.in_a_row, bad.in_all, list(bad.sample_ids)) for bad in found.read()]
    assert read == [(1, 1, 1, ["s1"]), (3, 1, 2, ["s3"]), (4, 2, 3, ["s4"])]
    assert list(found.read()) == []
    found.note(5, torch.tensor(True), [])
    assert list(found.read()) == []
    assert (found.in_a_row, found.in_all) == (0, 3)
