from __future__ import annotations

import math

import pytest

from diffalign.objectives.nca import nca_loss
from tests.objectives.responses import numbers


def test_a_chosen_side_far_above_its_reference_is_sampled_back():
    # The slope of the chosen side is -(1 - s) + s / 2 with s its sigmoid: 0 at s = 2/3.
    chosen = numbers([0.0, math.log(2), 4.0]).requires_grad_()
    nca_loss(chosen, numbers([0.0, 0.0, 0.0])).sum().backward()
    sigmoid = 1 / (1 + math.exp(-4))
    assert chosen.grad.tolist() == pytest.approx([-0.25, 0.0, -(1 - sigmoid) + sigmoid / 2])


def test_value_at_the_reference():
    assert nca_loss(numbers([0.0]), numbers([0.0])).item() == pytest.approx(2 * math.log(2))
