from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from diffalign.objectives.asft import ASFT, align_loss
from diffalign.objectives.orpo import log_odds
from tests.objectives.responses import averages, numbers


def test_it_compares_each_side_by_its_own_odds():
    views = averages()
    chosen, rejected = views["chosen"].policy, views["rejected"].policy
    expected = -logsigmoid(log_odds(chosen)) - logsigmoid(-log_odds(rejected))
    assert torch.allclose(align_loss(chosen, rejected), expected)
    loss = ASFT(odds_weight=0.3)(views).loss
    assert torch.allclose(loss, -chosen + 0.3 * expected)


def test_gradient_worked_by_hand():
    chosen, rejected = (numbers([math.log(p)]).requires_grad_() for p in (0.5, 0.2))
    align_loss(chosen, rejected).backward()
    assert chosen.grad.item() == pytest.approx(-1.0)
    assert rejected.grad.item() == pytest.approx(0.25)  # p / (1 - p)


def test_a_weight_without_comparison_is_refused():
    with pytest.raises(ValueError, match="odds_weight must be greater than 0"):
        ASFT(odds_weight=0.0)
