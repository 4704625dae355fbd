from __future__ import annotations

import math

import pytest

from diffalign.objectives.npo import NPO, npo_loss
from tests.objectives.responses import numbers


def test_the_pull_fades_as_the_response_is_forgotten():
    # The slope is 2 sigmoid(beta * log-ratio).
    ratio = numbers([0.0, -20.0]).requires_grad_()
    loss = npo_loss(ratio, beta=0.5)
    loss.sum().backward()
    assert loss[0].item() == pytest.approx(4 * math.log(2))
    assert ratio.grad.tolist() == pytest.approx([1.0, 2 / (1 + math.exp(10))])


def test_it_sees_the_rejected_side_alone():
    assert NPO(beta=0.1).views == {"rejected"}
