from __future__ import annotations

import io
import json
import os
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from diffalign.errors import CheckpointError, TrainingError
from diffalign.objectives.aot import AOT
from diffalign.objectives.asft import ASFT
from diffalign.objectives.bco import BCO
from diffalign.objectives.cpo import CPO
from diffalign.objectives.dpo import DPO
from diffalign.objectives.kto import KTO
from diffalign.objectives.orpo import ORPO
from diffalign.objectives.sft import SFT
from diffalign.objectives.weighted_sum import Term, WeightedSum
from diffalign.training import checkpoint
from tests.training.toys import toy_trainer, weights


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_training_raises_the_margin(tmp_path):
    trainer = toy_trainer(tmp_path, optimizer_steps=40, log_every=10)
    assert trainer.fit()
    written = rows(tmp_path)
    assert [row["step"] for row in written] == [10, 20, 30, 40]
    assert written[0]["samples"] == 40
    assert written[-1]["margin"] > written[0]["margin"]
    assert written[-1]["loss"] < written[0]["loss"]
    assert {"loss", "accuracy", "margin", "grad_norm", "drift/chosen", "drift/rejected"} <= set(
        written[-1]
    )


def test_the_same_run_twice_gives_identical_numbers_and_weights(tmp_path):
    first, second = toy_trainer(tmp_path / "a"), toy_trainer(tmp_path / "b")
    first.fit()
    second.fit()
    assert torch.equal(weights(first), weights(second))
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DPO(beta=1.0),
        lambda: SFT(),
        lambda: SFT(per="response"),
        lambda: CPO(beta=1.0),
        lambda: ORPO(odds_weight=0.5),
        lambda: ASFT(odds_weight=0.5),
        lambda: KTO(beta=1.0),
        lambda: BCO(beta=1.0),
        lambda: AOT(beta=1.0),
        lambda: AOT(beta=1.0, form="unpaired"),
        lambda: WeightedSum(
            terms=(
                Term(objective=KTO(beta=1.0)),
                Term(objective=SFT(), weight=0.5),
                Term(objective=BCO(beta=2.0)),
            )
        ),
    ],
)
def test_accumulated_micro_batches_equal_one_large_batch(tmp_path, make):
    # One after the other: accelerate's accumulation state is one per process.
    whole = toy_trainer(tmp_path / "whole", per_device=8, objective=make())
    whole.fit()
    parts = toy_trainer(tmp_path / "parts", per_device=2, accumulation=4, objective=make())
    parts.fit()
    assert whole.samples_per_step == parts.samples_per_step == 8
    for ours, theirs in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert torch.allclose(weights(whole), weights(parts), atol=1e-5)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_does(tmp_path, at, ema_decay):
    settings = {"optimizer_steps": 8, "log_every": 3, "dropout": 0.3, "ema_decay": ema_decay}
    whole = toy_trainer(tmp_path / "whole", **settings)
    whole.fit()
    first = toy_trainer(tmp_path / "cut", checkpoint_every=at, keep_checkpoints=9, **settings)
    first.fit()  # what it wrote after checkpoint `at` must not matter
    second = toy_trainer(tmp_path / "cut", checkpoint_every=100, **settings)
    torch.manual_seed(999)
    second.resume(tmp_path / "cut" / f"checkpoint-{at}")
    assert second.step == at
    second.fit()
    assert torch.equal(weights(whole), weights(second))
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    if ema_decay:
        for name, value in whole.average.state_dict().items():
            assert torch.equal(value, second.average.state_dict()[name])


def test_what_a_loss_remembers_survives_a_resumption(tmp_path):
    def remembering():
        # Twice, so that one memory cannot stand for the other.
        terms = (Term(objective=BCO(beta=1.0)), Term(objective=BCO(beta=0.1)))
        return WeightedSum(terms=terms)

    settings = {"optimizer_steps": 6, "log_every": 1}
    whole = toy_trainer(tmp_path / "whole", objective=remembering(), **settings)
    whole.fit()
    cut = toy_trainer(tmp_path / "cut", objective=remembering(), checkpoint_every=3, **settings)
    cut.fit()
    resumed = toy_trainer(tmp_path / "cut", objective=remembering(), **settings)
    resumed.resume(tmp_path / "cut/checkpoint-3")
    resumed.fit()
    assert torch.equal(weights(whole), weights(resumed))
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    deltas = [row["bco/delta"] for row in rows(tmp_path / "whole")]
    assert all(deltas) and deltas[0] != rows(tmp_path / "whole")[0]["bco_2/delta"]


def test_a_checkpoint_of_another_run_is_refused_by_its_first_difference(tmp_path):
    toy_trainer(tmp_path, identity={"objective.beta": 5000.0, "seed": 0}).fit()
    other = toy_trainer(tmp_path, identity={"objective.beta": 2000.0, "seed": 0})
    message = r"belongs to another run: objective\.beta was 5000\.0 there and is 2000\.0 here"
    with pytest.raises(CheckpointError, match=message):
        other.resume(tmp_path / "checkpoint-6")


def test_a_step_that_is_not_finite_leaves_the_weights_as_they_were(tmp_path):
    # Samples 8-11 are the third step's.
    trainer = toy_trainer(tmp_path, poisoned=frozenset({9}), optimizer_steps=3, log_every=3)
    clean = toy_trainer(tmp_path / "clean", optimizer_steps=2)
    trainer.fit()
    clean.fit()
    assert torch.equal(weights(trainer), weights(clean))
    (row,) = rows(tmp_path)
    assert row["bad_steps"] == 1
    assert all(value == value for value in row.values())  # no NaN reached the log


def test_too_many_bad_steps_stop_the_run_with_the_samples_and_the_last_good_checkpoint(tmp_path):
    poisoned = frozenset(range(8, 100))
    trainer = toy_trainer(tmp_path, poisoned=poisoned, checkpoint_every=1, max_bad_steps=2)
    with pytest.raises(TrainingError, match=r"checkpoint-3.*toy-12, toy-13, toy-14, toy-15"):
        trainer.fit()
    good = checkpoint.load_checkpoint(tmp_path / "checkpoint-2")
    assert all(tensor.isfinite().all() for tensor in good.tensors["weights"].values())


def test_a_frozen_part_that_breaks_is_blamed_in_place_of_the_learning_rate(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, poisoned=frozenset(range(8, 100)), max_bad_steps=2)
    monkeypatch.setattr(trainer.model, "blame", lambda: "the autoencoder overflows: set vae_dtype")
    with pytest.raises(TrainingError, match=r"toy-15\. the autoencoder overflows: set vae_dtype$"):
        trainer.fit()


def test_what_a_model_finds_out_about_itself_is_said_at_the_next_line_of_the_log(tmp_path):
    stream = io.StringIO()
    trainer = toy_trainer(tmp_path, optimizer_steps=4, log_every=2)
    trainer.console = Console(file=stream, width=200)
    remarks = [[], ["rows are repeated"]]
    trainer.model.remarks = lambda: remarks.pop() if remarks else []
    trainer.fit()
    assert stream.getvalue().count("rows are repeated") == 1 and not remarks


def test_clipping_bounds_the_gradient_that_the_optimiser_sees(tmp_path):
    trainer = toy_trainer(tmp_path, max_grad_norm=1e-3, optimizer_steps=1)
    seen = []
    inner = trainer.optimizer.optimizer
    step = inner.step

    def spy(*arguments, **keywords):
        norms = torch.stack([p.grad.norm() for p in trainer.parameters])
        seen.append(norms.norm().item())
        return step(*arguments, **keywords)

    inner.step = spy
    trainer.fit()
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


def test_a_null_norm_turns_clipping_off(tmp_path):
    clipped = toy_trainer(tmp_path / "a", max_grad_norm=1e9)
    free = toy_trainer(tmp_path / "b", max_grad_norm=None)
    clipped.fit()
    free.fit()
    assert torch.equal(weights(clipped), weights(free))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_reports_an_incomplete_run(tmp_path, number):
    trainer = toy_trainer(tmp_path, optimizer_steps=50)
    evaluate = trainer._evaluate

    def interrupted(part, totals):
        if trainer.step == 3:
            os.kill(os.getpid(), number)
        return evaluate(part, totals)

    trainer._evaluate = interrupted
    assert not trainer.fit()
    (saved,) = checkpoint.checkpoints_in(tmp_path)
    assert saved.name == "checkpoint-4"  # the step that was under way, and no further one
    whole = toy_trainer(tmp_path / "whole", optimizer_steps=50)
    whole.fit()
    resumed = toy_trainer(tmp_path, optimizer_steps=50)
    resumed.resume(saved)
    resumed.fit()
    assert torch.equal(weights(resumed), weights(whole))


def test_a_failed_periodic_checkpoint_is_reported_and_the_run_goes_on(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, checkpoint_every=2)
    write = checkpoint.save_file

    def full_disk(tensors, path):
        if trainer.step == 4:
            raise OSError(28, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    assert trainer.fit()
    names = [path.name for path in checkpoint.checkpoints_in(tmp_path)]
    assert names == ["checkpoint-2", "checkpoint-6"]


def test_a_failed_last_checkpoint_is_an_error(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path)

    def full_disk(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="could not be written"):
        trainer.fit()


def test_the_learning_rate_of_every_step_is_the_one_of_the_schedule(tmp_path):
    trainer = toy_trainer(
        tmp_path, optimizer_steps=5, log_every=1, accumulation=2, lr=1e-2, schedule="linear"
    )
    trainer.fit()
    logged = [row["lr"] for row in rows(tmp_path)]
    assert logged == pytest.approx([1e-2 * (1 - step / 5) for step in range(5)])


def test_a_step_that_is_not_finite_leaves_the_average_as_it_was(tmp_path):
    poisoned = frozenset({9})  # of the third step
    trainer = toy_trainer(tmp_path, poisoned=poisoned, optimizer_steps=3, ema_decay=0.5)
    clean = toy_trainer(tmp_path / "clean", optimizer_steps=2, ema_decay=0.5)
    trainer.fit()
    clean.fit()
    for name, value in clean.average.state_dict().items():
        assert torch.equal(trainer.average.state_dict()[name], value)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_what_is_exported_is_the_average_where_there_is_one(tmp_path, ema_decay):
    trainer = toy_trainer(tmp_path, ema_decay=ema_decay)
    trainer.fit()
    trainer.export(tmp_path / "final")
    exported = load_file(tmp_path / "final/weights")
    last = dict(trainer.model.trained_parameters())
    expected = trainer.average.state_dict() if ema_decay else last
    for name, value in exported.items():
        assert torch.equal(value, expected[name])
        assert torch.equal(value, last[name]) == (ema_decay is None)
