from __future__ import annotations

import math

import pytest

from diffalign.objectives.simpo import SimPO, simpo_loss
from tests.objectives.responses import numbers


def test_value_and_gradient_worked_by_hand():
    # Reward margins 2 * (.5, 1) less the target 1: 0 and 1.
    margin = numbers([0.5, 1.0]).requires_grad_()
    loss = simpo_loss(margin, beta=2.0, gamma=1.0)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.log(2), math.log1p(math.exp(-1))])
    assert margin.grad.tolist() == pytest.approx([-1.0, -2 / (1 + math.e)])


def test_a_target_on_the_wrong_side_is_refused():
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        SimPO(beta=2.0, gamma=-1.0)
