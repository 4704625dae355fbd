from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import pytest
import torch

from diffalign import world
from diffalign.objectives.base import Likelihoods, StepTotals
from diffalign.objectives.bco import BCO, RunningMean
from tests.objectives.responses import numbers, plain


def log_ratios(chosen: list[float], rejected: list[float]) -> dict[str, Likelihoods]:
    return {
        side: plain(values, [0.0] * len(values))
        for side, values in (("chosen", chosen), ("rejected", rejected))
    }


def test_every_reward_so_far_weighs_alike():
    running = RunningMean()
    running.update(numbers(1.0), numbers(1.0))
    assert running.update(numbers(15.0), numbers(3.0)).item() == pytest.approx(4.0)


def test_a_batch_that_is_not_finite_leaves_no_trace():
    running = RunningMean()
    running.update(numbers(6.0), numbers(2.0))
    assert running.update(numbers(math.nan), numbers(2.0)).item() == 3.0
    assert running.update(numbers(6.0), numbers(1.0)).item() == pytest.approx(4.0)


def test_the_rewards_of_all_ranks_count(monkeypatch):
    # Elsewhere, as many of the same.
    monkeypatch.setattr(world, "total", lambda mine: 2 * mine.detach())
    objective = BCO(beta=1.0)
    assert objective(log_ratios([3.0], [1.0])).metrics["delta"].item() == 2.0
    assert objective.state_dict()["count"].item() == 4.0


def test_a_step_is_taken_in_once_however_many_parts_it_has():
    parts = [log_ratios([3.0], [1.0]), log_ratios([5.0], [7.0])]

    def of_step(number: int) -> list[dict[str, Likelihoods]]:
        totals = {
            side: StepTotals.of([part[side] for part in parts], step=number)
            for side in ("chosen", "rejected")
        }
        return [{s: replace(v, whole_step=totals[s]) for s, v in part.items()} for part in parts]

    objective = BCO(beta=1.0)
    for number in (0, 1):
        for part in of_step(number):
            assert objective(part).metrics["delta"].item() == 4.0
    assert objective.state_dict()["count"].item() == 8.0


def test_the_threshold_has_no_gradient():
    views = log_ratios([1.0], [0.0])
    BCO(beta=2.0)(views).loss.sum().backward()  # rewards 2 and 0, threshold 1
    slope = 2.0 / (1 + math.e) / 2
    assert views["chosen"].policy.grad.item() == pytest.approx(-slope)
    assert views["rejected"].policy.grad.item() == pytest.approx(slope)


def test_the_memory_goes_from_one_run_to_its_continuation():
    first, second, whole = BCO(beta=1.0), BCO(beta=1.0), BCO(beta=1.0)
    early, late = log_ratios([1.0, 2.0], [0.0, 0.5]), log_ratios([3.0], [1.0])
    first(early)
    whole(early)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(late).loss, whole(late).loss)
    assert not torch.equal(BCO(beta=1.0)(late).loss, whole(late).loss)


def test_the_memory_is_no_setting():
    objective = BCO(beta=1.0)
    objective(log_ratios([1.0], [0.0]))
    assert objective == BCO(beta=1.0)
    assert [field.name for field in dataclasses.fields(objective)] == ["beta"]
