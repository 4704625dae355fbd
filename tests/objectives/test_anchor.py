from __future__ import annotations

import math

import pytest

from diffalign.objectives.anchor import Anchor, anchor_loss
from tests.objectives.responses import numbers, responses


@pytest.mark.parametrize(("direction", "sign"), [("up", 1), ("down", -1)])
def test_value_and_gradient_worked_by_hand(direction, sign):
    reward = numbers([0.5, 2.5]).requires_grad_()
    loss = anchor_loss(reward, delta=0.5, direction=direction)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.log(2), math.log1p(math.exp(-2 * sign))])
    slopes = [0.5, 1 / (1 + math.exp(2 * sign))]
    assert reward.grad.tolist() == pytest.approx([-sign * slope for slope in slopes])


def test_the_chosen_view_is_held_up_and_the_rejected_one_down():
    assert Anchor(beta=0.1).views == {"chosen"}
    down = Anchor(beta=0.5, direction="down")
    assert down.views == {"rejected"}
    # Log-ratio -.4 of the first rejected response.
    assert down(responses()).loss[0].item() == pytest.approx(math.log1p(math.exp(-0.2)))
