from __future__ import annotations

import pytest

from diffalign.objectives.apo import apo_loss
from tests.objectives.responses import numbers


@pytest.mark.parametrize(
    ("form", "slopes"),
    [
        ("zero", (-0.25, 0.25)),  # the chosen side up, the rejected one down
        ("down", (0.25 - 0.25, 0.25)),
    ],
)
def test_slopes_at_the_reference(form, slopes):
    chosen, rejected = (numbers([0.0]).requires_grad_() for _ in range(2))
    loss = apo_loss(chosen, rejected, form=form)
    loss.backward()
    assert loss.item() == 1.0
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx(slopes)


def test_down_pushes_a_chosen_side_down_once_the_pair_is_told_apart():
    chosen, rejected = numbers([0.0]).requires_grad_(), numbers([-6.0])
    apo_loss(chosen, rejected, form="down").backward()
    assert chosen.grad.item() > 0.2
