from __future__ import annotations

import dataclasses

import pytest
import torch

from diffalign.objectives.base import Likelihoods
from diffalign.objectives.ipo import IPO
from diffalign.objectives.margin_regression import MarginRegression
from tests.objectives.fixtures import denoised_pairs, denoised_views
from tests.objectives.responses import numbers


def pairs(target):
    """REBEL's check: the first half of four samples against the second."""
    return {
        "chosen": Likelihoods(
            numbers([-10.2, -12.5]).requires_grad_(), numbers([-10.0, -12.0]), target=target
        ),
        "rejected": Likelihoods(
            numbers([-9.0, -11.0]).requires_grad_(), numbers([-9.5, -10.5]), target=target
        ),
    }


GAPS = numbers([1.2 - 0.4, 0.3 - 0.9])


@pytest.mark.parametrize(
    ("beta", "loss", "gradient"),
    [
        (2.0, 2.6, [-4.4, 1.2, 4.4, -1.2]),
        (0.1, 0.55845, [-0.087, 0.06, 0.087, -0.06]),
    ],
)
def test_copg(beta, loss, gradient):
    views = pairs(GAPS)
    found = MarginRegression(beta=beta)(views).loss.mean()
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-12)
    slopes = [*views["chosen"].policy.grad.tolist(), *views["rejected"].policy.grad.tolist()]
    assert slopes == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize(
    ("eta", "loss", "gradient"),
    [(1.0, 1.305, [-1.5, 0.6, 1.5, -0.6]), (0.5, 0.65, [-1.1, 0.3, 1.1, -0.3])],
)
def test_rebel(eta, loss, gradient):
    """Values of the authors' code. Ours is divided by the square of beta = 1 / eta."""
    views = pairs(GAPS)
    found = MarginRegression(beta=1 / eta, divided_by_beta=True)(views).loss.mean()
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-12)
    slopes = [*views["chosen"].policy.grad.tolist(), *views["rejected"].policy.grad.tolist()]
    assert slopes == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize(
    ("beta", "loss", "norm", "first_chosen", "first_rejected"),
    [
        (5000.0, 6.138794386761, 122.837872192235, None, None),
        (500.0, 0.017594038939, 0.695654560938, 0.021247629237, 0.028050901639),
    ],
)
def test_calibrated_gaps_of_denoising_errors(beta, loss, norm, first_chosen, first_rejected):
    """CaPO at kappa = beta / 2, on given targets."""
    policy, reference, target = denoised_pairs(torch.float64)
    policy.requires_grad_()
    views = {
        name: dataclasses.replace(view, target=numbers([0.5, 0.25, 0.1]))
        for name, view in denoised_views(policy, reference, target, ("chosen", "rejected")).items()
    }
    found = MarginRegression(beta=beta)(views).loss.mean()
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-10)
    assert policy.grad.norm().item() == pytest.approx(norm, abs=1e-10)
    if first_chosen is not None:
        assert policy.grad[0, 0, 0, 0].item() == pytest.approx(first_chosen, abs=1e-10)
        assert policy.grad[3, 0, 0, 0].item() == pytest.approx(first_rejected, abs=1e-10)


def test_one_half_for_every_pair_is_ipo_in_rewards():
    views = pairs(numbers([0.5, 0.5]))
    ours = MarginRegression(beta=0.3)(views).loss
    assert torch.allclose(ours, IPO(beta=0.3, in_rewards=True)(views).loss, rtol=0, atol=1e-15)


def test_exchanged_sides_with_the_other_target_are_the_same_loss():
    views, turned = pairs(GAPS), pairs(-GAPS)
    turned = {"chosen": turned["rejected"], "rejected": turned["chosen"]}
    objective = MarginRegression(beta=2.0)
    assert torch.equal(objective(views).loss, objective(turned).loss)


def test_a_pair_without_a_target_is_refused():
    with pytest.raises(ValueError, match=r"needs a target of each pair.*strength\.target"):
        MarginRegression(beta=1.0)(pairs(None))
