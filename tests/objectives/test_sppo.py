from __future__ import annotations

import dataclasses

import pytest

from diffalign.objectives.sppo import SPPO, sppo_loss
from tests.objectives.responses import numbers, responses, row_of


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


RATES = numbers([0.8, 0.6, 0.9])


@pytest.mark.parametrize(("sides", "scale"), [("sum", 2), ("mean", 1)])
def test_the_authors_code_has_half_of_their_formula(sides, scale):
    """`sppo_loss` of uclaml/SPPO on the three pairs, whose win rates differ."""
    found = [
        SPPO(beta=0.5, win_rate=rate, sides=sides)(row_of(responses(), row)).loss.item()
        for row, rate in enumerate(RATES.tolist())
    ]
    assert found == pytest.approx([scale * value for value in (0.02, 0.17, 0.245)], abs=1e-12)


def test_a_preference_has_the_gradient_of_a_win_rate():
    slopes = []
    for preference, rates in ((RATES, [1.0] * 3), (None, RATES.tolist())):
        views = {
            side: dataclasses.replace(responses()[side], preference=preference)
            for side in ("chosen", "rejected")
        }
        for row, rate in enumerate(rates):
            of_row = {
                name: dataclasses.replace(
                    view, preference=None if preference is None else preference[row : row + 1]
                )
                for name, view in row_of(views, row).items()
            }
            SPPO(beta=0.5, win_rate=rate)(of_row).loss.sum().backward()
        slopes.append([views[side].policy.grad.tolist() for side in ("chosen", "rejected")])
    assert slopes[0] == [pytest.approx(side) for side in slopes[1]]


@pytest.mark.parametrize("win_rate", [0.5, 1.1])
def test_a_chosen_side_that_does_not_win_is_refused(win_rate):
    with pytest.raises(ValueError, match=r"win_rate must be above 0\.5"):
        SPPO(beta=0.5, win_rate=win_rate)
