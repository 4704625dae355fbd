from __future__ import annotations

import pytest

from diffalign.objectives.ipo import IPO, ipo_loss
from tests.objectives.responses import numbers, responses


@pytest.mark.parametrize(
    ("margin", "beta", "expected"),
    [
        (5.0, 0.1, 0.0),  # target gap 1 / 0.2 = 5, already reached
        (0.0, 0.1, 25.0),  # policy equals reference: (0 - 5)^2
        (7.0, 0.1, 4.0),  # overshoot costs too: (7 - 5)^2
        (-1.0, 0.5, 4.0),  # target gap 1: (-1 - 1)^2
    ],
)
def test_value_worked_by_hand(margin, beta, expected):
    assert ipo_loss(numbers([margin]), beta=beta).item() == pytest.approx(expected)


def test_gradient_worked_by_hand():
    margin = numbers([0.0, 5.0, 7.0]).requires_grad_()
    ipo_loss(margin, beta=0.1).sum().backward()
    assert margin.grad.tolist() == pytest.approx([-10.0, 0.0, 4.0])  # 2 * (margin - 5)


def test_in_rewards_it_is_the_distance_from_one_half():
    # Margins of beta .1 on the three pairs: .1, -.04, .09.
    loss = IPO(beta=0.1, in_rewards=True)(responses()).loss
    assert loss.tolist() == pytest.approx([0.4**2, 0.54**2, 0.41**2])
