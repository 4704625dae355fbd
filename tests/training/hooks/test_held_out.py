from __future__ import annotations

import math

import pytest
import torch

from diffalign.intervals import Bootstrap, ratio
from diffalign.objectives.base import Likelihoods
from diffalign.objectives.bco import BCO
from diffalign.objectives.dpo import DPO
from diffalign.objectives.kto import KTO
from diffalign.objectives.sft import SFT
from diffalign.training.hooks.held_out import (
    EvaluationConfig,
    HeldOutEvaluation,
    implicit_accuracy,
)
from diffalign.training.look_ahead import MicroBatch
from tests.runs import figures
from tests.training.toys import ToyHeldOut, ToySource, toy_trainer, weights


def evaluation(every: int = 2) -> HeldOutEvaluation:
    return HeldOutEvaluation(ToyHeldOut(), EvaluationConfig(every=every))


def held_out(path) -> dict[int, dict[str, float]]:
    rows = {row["step"]: row for row in figures(path)}
    return {n: row for n, row in rows.items() if "held_out/loss" in row}


def test_it_runs_before_the_first_step_every_so_many_and_after_the_last(tmp_path):
    toy_trainer(tmp_path, hooks=[evaluation(3)], optimizer_steps=7, log_every=2).fit()
    assert [*held_out(tmp_path)] == [0, 3, 6, 7]
    assert [row["step"] for row in figures(tmp_path)] == [0, 2, 3, 4, 6, 7]
    assert "loss" not in figures(tmp_path)[2]  # of step 3, between two logging intervals
    assert {"loss", "held_out/loss"} <= set(figures(tmp_path)[4])  # of step 6, of both


def test_its_figures_are_those_of_the_policy_on_all_held_out_pairs_at_once(tmp_path):
    trainer = toy_trainer(tmp_path, hooks=[evaluation()], optimizer_steps=4)
    trainer.fit()
    batch = ToySource(8).batch(range(1000, 1008))
    with torch.no_grad():
        views = trainer.views(MicroBatch(batch))
        loss = trainer.objective(views).loss.mean()
    row = held_out(tmp_path)[4]
    assert row["held_out/loss"] == pytest.approx(loss.item(), abs=1e-6)
    chosen, rejected = views["chosen"].log_ratio, views["rejected"].log_ratio
    assert row["held_out/accuracy"] == (chosen > rejected).float().mean().item()
    assert row["held_out/drift/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-6)
    assert row["held_out/drift/rejected"] == pytest.approx(rejected.mean().item(), abs=1e-6)
    assert row["held_out/pairs"] == 8


@pytest.mark.parametrize("loss", [DPO, KTO, BCO])
def test_a_run_that_is_watched_ends_with_the_weights_and_figures_of_one_that_is_not(tmp_path, loss):
    settings = {"optimizer_steps": 6, "dropout": 0.4, "accumulation": 2, "log_every": 1}
    blind = toy_trainer(tmp_path / "blind", objective=loss(beta=1.0), **settings)
    blind.fit()
    hooks = [evaluation()]
    watched = toy_trainer(tmp_path / "watched", objective=loss(beta=1.0), hooks=hooks, **settings)
    watched.fit()
    assert torch.equal(weights(blind), weights(watched))
    assert all(module.training for module in watched.model.network.modules())
    own = [
        {name: value for name, value in row.items() if not name.startswith("held_out/")}
        for row in figures(tmp_path / "watched")
    ]
    assert own[1:] == figures(tmp_path / "blind")


def test_a_resumed_run_writes_the_same_figures(tmp_path):
    whole = toy_trainer(tmp_path / "whole", hooks=[evaluation()], optimizer_steps=6)
    whole.fit()
    first = toy_trainer(tmp_path / "cut", hooks=[evaluation()], checkpoint_every=3)
    first.fit()
    second = toy_trainer(tmp_path / "cut", hooks=[evaluation()])
    second.resume(tmp_path / "cut/checkpoint-3")
    second.fit()
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def test_a_run_that_begins_anew_in_its_folder_does_not_keep_its_first_row_twice(tmp_path):
    toy_trainer(tmp_path, hooks=[evaluation()]).fit()
    toy_trainer(tmp_path, hooks=[evaluation()]).fit()
    assert [row["step"] for row in figures(tmp_path)] == [0, 2, 4, 6]


def test_the_interval_is_that_of_resampled_prompts():
    margins = torch.tensor([1.0, 1.0, -1.0, 0.0, 1.0, -1.0])
    views = {
        "chosen": Likelihoods(margins, torch.zeros(6)),
        "rejected": Likelihoods(torch.zeros(6), torch.zeros(6)),
    }
    found = implicit_accuracy(views, ["b", "b", "a", "a", "c", "c"])
    assert found["accuracy"] == pytest.approx((1 + 1 + 0 + 0.5 + 1 + 0) / 6)
    expected = Bootstrap().intervals(
        {"right": [0.5, 2.0, 1.0], "n": [2.0, 2.0, 2.0]},
        {"a": lambda counted: ratio(counted["right"], counted["n"])},
        {"a": 1.0},
    )["a"]
    assert (found["accuracy_low"], found["accuracy_high"]) == tuple(expected)
    alone = implicit_accuracy(views, ["a"] * 6)
    assert set(alone) == {"accuracy"}  # one prompt says nothing of others


def test_without_a_reference_the_likelihood_of_a_token_decides():
    views = {
        "chosen": Likelihoods(torch.tensor([-4.0]), length=torch.tensor([4.0])),
        "rejected": Likelihoods(torch.tensor([-3.0]), length=torch.tensor([2.0])),
    }
    assert implicit_accuracy(views, ["a"])["accuracy"] == 1.0


def test_the_views_of_both_sides_are_compared_next_to_the_images_as_they_are():
    def view(value: float) -> Likelihoods:
        return Likelihoods(torch.tensor([value]), torch.zeros(1))

    worse = {"chosen@crop": view(-9.0), "rejected@crop": view(9.0)}
    plain = {"chosen": view(1.0), "rejected": view(0.0)}
    assert implicit_accuracy({**worse, **plain}, ["a"])["accuracy"] == 1.0
    assert implicit_accuracy(worse, ["a"])["accuracy"] == 0.0
    changed = {"chosen:changed": view(1.0), "rejected:changed": view(0.0)}
    assert implicit_accuracy(changed, ["a"])["accuracy"] == 1.0
    assert implicit_accuracy({"chosen": view(1.0)}, ["a"]) == {}
    unpaired = {
        n: Likelihoods(v.policy, v.reference, rows=torch.tensor([0])) for n, v in plain.items()
    }
    assert implicit_accuracy(unpaired, ["a"]) == {}


def test_a_loss_of_one_side_alone_is_evaluated(tmp_path):
    toy_trainer(tmp_path, objective=SFT(), hooks=[evaluation()]).fit()
    assert math.isfinite(held_out(tmp_path)[6]["held_out/loss"])
