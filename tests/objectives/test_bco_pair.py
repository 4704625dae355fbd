from __future__ import annotations

import math

import pytest

from diffalign.objectives.bco_pair import bco_loss
from tests.objectives.responses import numbers


def test_value_and_gradient_worked_by_hand():
    chosen, rejected = numbers([0.0, 2.0]).requires_grad_(), numbers([0.0, -2.0]).requires_grad_()
    loss = bco_loss(chosen, rejected)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([2 * math.log(2), 2 * math.log1p(math.exp(-2))])
    slopes = [0.5, 1 / (1 + math.exp(2))]
    assert chosen.grad.tolist() == pytest.approx([-slope for slope in slopes])
    assert rejected.grad.tolist() == pytest.approx(slopes)
