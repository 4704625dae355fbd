from __future__ import annotations

from diffalign.objectives.hinge import hinge_loss
from tests.objectives.responses import numbers


def test_value_and_gradient_worked_by_hand():
    margin = numbers([-4.0, 0.0, 1.0, 3.0]).requires_grad_()
    loss = hinge_loss(margin, beta=0.5)
    loss.sum().backward()
    assert loss.tolist() == [3.0, 1.0, 0.5, 0.0]
    assert margin.grad.tolist() == [-0.5, -0.5, -0.5, 0.0]  # a pair that is told apart rests


def test_value_published_for_denoising_errors():
    # Reward margins of the diffusion fixtures.
    assert hinge_loss(numbers([1.5, -0.5, 0.0, 4.0]), beta=1.0).mean().item() == 0.625
