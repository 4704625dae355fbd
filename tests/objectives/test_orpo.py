from __future__ import annotations

import math

import pytest
import torch

from diffalign.objectives.base import Likelihoods
from diffalign.objectives.orpo import ORPO, log_complement, log_odds
from tests.objectives.responses import numbers


def test_odds_worked_by_hand():
    logs = numbers([math.log(p) for p in (0.5, 0.8, 0.01)])
    assert log_odds(logs).tolist() == pytest.approx([0.0, math.log(4), -math.log(99)])


@pytest.mark.parametrize("log_probability", [-1e-6, -1e-3, -0.69, -0.70, -5.0, -30.0])
def test_single_precision_keeps_the_digits(log_probability):
    single = log_complement(torch.tensor(log_probability)).item()
    exact = math.log(-math.expm1(torch.tensor(log_probability).item()))
    assert single == pytest.approx(exact, rel=1e-5)


def test_a_certainty_has_finite_odds_and_no_gradient():
    logs = torch.zeros(1, requires_grad=True)
    complement = log_complement(logs)
    complement.backward()
    assert complement.item() == pytest.approx(math.log(torch.finfo(torch.float32).eps))
    assert logs.grad.item() == 0.0


def test_gradient_of_one_pair_worked_by_hand():
    # d log-odds(p) / d log p = 1 / (1 - p): 2 at one half, 1.25 at one fifth; odds differ by log 4.
    chosen, rejected = (numbers([math.log(p)]).requires_grad_() for p in (0.5, 0.2))
    views = {"chosen": Likelihoods(chosen), "rejected": Likelihoods(rejected)}
    ORPO(odds_weight=0.1)(views).loss.backward()
    assert chosen.grad.item() == pytest.approx(-1 - 0.1 * 0.2 * 2)
    assert rejected.grad.item() == pytest.approx(0.1 * 0.2 * 1.25)


def test_without_its_odds_it_is_another_objective():
    with pytest.raises(ValueError, match=r"odds_weight must be greater than 0.*the objective sft"):
        ORPO(odds_weight=0.0)
