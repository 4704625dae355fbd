from __future__ import annotations

import pytest

from diffalign.objectives.sppo import SPPO, sppo_loss
from tests.objectives.responses import numbers, responses


def test_value_and_gradient_worked_by_hand():
    # A certain win at beta .5 should have a log-ratio of 1.
    ratio = numbers([0.0, 1.0, 3.0]).requires_grad_()
    loss = sppo_loss(ratio, 1.0, beta=0.5)
    loss.sum().backward()
    assert loss.tolist() == [1.0, 0.0, 4.0]
    assert ratio.grad.tolist() == [-2.0, 0.0, 4.0]


def test_uncertain_wins_ask_for_less():
    # Log-ratios .6 and -.4 of the first pair, 2 * (.8 - .5) and its negative.
    loss = SPPO(beta=0.5, win_rate=0.8)(responses()).loss
    assert loss[0].item() == pytest.approx((0.6 - 0.6) ** 2 + (-0.4 + 0.6) ** 2)


@pytest.mark.parametrize("win_rate", [0.5, 1.1])
def test_a_chosen_side_that_does_not_win_is_refused(win_rate):
    with pytest.raises(ValueError, match=r"win_rate must be above 0\.5"):
        SPPO(beta=0.5, win_rate=win_rate)
