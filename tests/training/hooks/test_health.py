from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from diffalign.files import read_json_lines
from diffalign.training.health_record import Record
from diffalign.training.hooks import health
from diffalign.training.hooks.health import HEALTH, Health
from diffalign.training.verdicts import Verdict
from tests.runs import figures, files
from tests.training.toys import toy_trainer, weights

TOO_FAST = Verdict("too_fast", "it moves too fast. Lower optimizer.lr.", {"a": 1.0}, True)
NO_USE = Verdict("no_use", "it is of no use. Take other data.", {"b": 2.0}, False)


@pytest.fixture
def rule(monkeypatch):
    """Lets a test say from which sample on which verdicts hold; they rest on the latest figures
    alone, of one interval or more."""

    def say(*found: Verdict, after: int) -> None:
        def rules(record: Record) -> list[Verdict]:
            latest = record.latest
            return list(found) if len(latest) > 1 and latest[-1]["step"] >= after else []

        monkeypatch.setattr(health, "verdicts_on", rules)

    return say


def run(output, action="warn", **settings):
    """A trainer of eight steps, logged one by one, and what it prints."""
    output.mkdir(parents=True, exist_ok=True)
    hook = Health(action, "token log-probability", output)
    settings = {"optimizer_steps": 8, "log_every": 1, **settings}
    trainer = toy_trainer(output, hooks=[hook], **settings)
    trainer.console = Console(file=io.StringIO(), width=1000)
    return trainer


def said(trainer) -> str:
    return trainer.console.file.getvalue()


def test_a_verdict_is_printed_once_and_written_with_its_figures(tmp_path, rule):
    rule(TOO_FAST, after=4)
    trainer = run(tmp_path)
    assert trainer.fit()
    assert said(trainer).count("health, step 4: too_fast: it moves too fast. Lower") == 1
    assert read_json_lines(tmp_path / HEALTH) == [
        {
            "step": 4,
            "verdict": "too_fast",
            "says": "it moves too fast. Lower optimizer.lr.",
            "figures": {"a": 1.0},
        }
    ]
    marked = [row["step"] for row in figures(tmp_path) if row.get("health/too_fast") == 1]
    assert marked == [4, 5, 6, 7, 8]


def test_a_warning_changes_no_weight(tmp_path, rule):
    rule(TOO_FAST, after=2)
    warned = run(tmp_path / "warned", dropout=0.4)
    warned.fit()
    plain = toy_trainer(tmp_path / "plain", optimizer_steps=8, log_every=1, dropout=0.4)
    plain.fit()
    assert torch.equal(weights(warned), weights(plain))


def test_stop_ends_with_a_checkpoint_and_the_sentence(tmp_path, rule):
    rule(TOO_FAST, after=4)
    trainer = run(tmp_path, "stop")
    assert not trainer.fit()
    assert trainer.step == 4
    assert trainer.stopped_for == "too_fast: it moves too fast. Lower optimizer.lr."
    assert (tmp_path / "checkpoint-4/state.json").is_file()


def test_a_stopped_run_goes_on_to_the_end_when_it_is_only_warned(tmp_path, rule):
    rule(TOO_FAST, after=4)
    run(tmp_path / "cut", "stop").fit()
    again = run(tmp_path / "cut", "stop")
    again.resume(tmp_path / "cut/checkpoint-4")
    assert not again.fit() and again.step == 5  # what it found still holds
    warned = run(tmp_path / "cut", "warn")
    warned.resume(tmp_path / "cut/checkpoint-5")
    assert warned.fit()
    whole = run(tmp_path / "whole", "warn")
    whole.fit()
    assert torch.equal(weights(warned), weights(whole))


def test_back_off_halves_the_rate_of_all_steps_to_come(tmp_path, rule):
    rule(TOO_FAST, after=4)
    trainer = run(tmp_path, "back_off", schedule="linear", optimizer_steps=10)
    assert trainer.fit()
    rates = {row["step"]: row["lr"] for row in figures(tmp_path)}
    linear = {step: 1e-2 * (1 - (step - 1) / 10) for step in rates}
    # Said after step 4, and again two intervals after that, and so on: figures start afresh.
    factors = {step: rates[step] / linear[step] for step in rates}
    assert factors == pytest.approx(
        {1: 1, 2: 1, 3: 1, 4: 1, 5: 0.5, 6: 0.5, 7: 0.25, 8: 0.25, 9: 0.125, 10: 0.125}
    )
    assert said(trainer).count("0.5 times what it was from here on") == 4


def test_back_off_gives_up_at_a_sixteenth(tmp_path, rule):
    rule(TOO_FAST, after=2)
    run(tmp_path, "back_off", optimizer_steps=20).fit()
    assert figures(tmp_path)[-1]["lr"] == pytest.approx(1e-2 / 16)


def test_back_off_leaves_the_rate_where_it_is_not_the_remedy(tmp_path, rule):
    rule(NO_USE, after=3)
    trainer = run(tmp_path, "back_off")
    trainer.fit()
    assert figures(tmp_path)[-1]["lr"] == 1e-2
    assert said(trainer).count("no_use: it is of no use") == 1


@pytest.mark.parametrize("step", [3, 4, 5, 6])
def test_a_run_that_backs_off_is_resumed_exactly(tmp_path, rule, step):
    rule(TOO_FAST, after=4)
    whole = run(tmp_path / "whole", "back_off", schedule="linear")
    whole.fit()
    run(
        tmp_path / "cut", "back_off", schedule="linear", checkpoint_every=step, keep_checkpoints=3
    ).fit()
    second = run(tmp_path / "cut", "back_off", schedule="linear")
    second.resume(tmp_path / f"cut/checkpoint-{step}")
    second.fit()
    assert torch.equal(weights(second), weights(whole))
    for name in (HEALTH, "metrics.jsonl", "checkpoint-8/health.safetensors"):
        assert files(tmp_path / "cut")[name] == files(tmp_path / "whole")[name]


def test_a_checkpoint_from_before_there_were_verdicts_is_taken(tmp_path, rule):
    toy_trainer(tmp_path, optimizer_steps=8, log_every=1, checkpoint_every=3).fit()
    trainer = run(tmp_path)
    trainer.resume(tmp_path / "checkpoint-6")
    assert trainer.fit()


def test_a_sound_run_is_called_sound(tmp_path):
    trainer = run(tmp_path)
    trainer.fit()
    assert "health: nothing harmful was seen" in said(trainer)
    assert not (tmp_path / HEALTH).exists()
