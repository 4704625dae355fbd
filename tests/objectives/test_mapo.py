from __future__ import annotations

import math

import pytest
import torch

from diffalign.objectives.base import Likelihoods
from diffalign.objectives.mapo import MaPO, denoising_score
from tests.objectives.fixtures import denoised_pairs, denoised_views

PUBLISHED = {
    # Values of the MaPO authors' own loss lines, run in float64 on `denoised_pairs`:
    # beta -> loss, norm of its gradient by the prediction.
    0.1: (0.080599287659, 0.133264980),
    1.0: (0.716052949178, 1.285704432),
}


def views_of_errors(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, Likelihoods]:
    return {"chosen": Likelihoods(-chosen / 2), "rejected": Likelihoods(-rejected / 2)}


def exact_score(error: float) -> float:
    """1000 * (phi - 1) in double precision, whose rounding near 1 costs some 1e-13."""
    z = 0.5 * error
    return 1000 * (z / math.expm1(z) - 1)


@pytest.mark.parametrize(
    ("dtype", "value_within", "gradient_within"),
    [(torch.float32, 1e-6, 1e-6), (torch.float64, 1e-10, 1e-9)],
)
@pytest.mark.parametrize("beta", PUBLISHED)
def test_value_and_gradient_published_by_the_authors_code(
    beta, dtype, value_within, gradient_within
):
    policy, reference, target = denoised_pairs(dtype)
    policy.requires_grad_()
    views = denoised_views(policy, reference, target, ("chosen", "rejected"))
    loss = MaPO(beta=beta)(views).loss.mean()
    loss.backward()
    value, gradient_norm = PUBLISHED[beta]
    assert loss.item() == pytest.approx(value, abs=value_within)
    assert policy.grad.norm().item() == pytest.approx(gradient_norm, abs=gradient_within)


def test_one_pair_worked_by_hand():
    # Errors .10 and .13: 1000 * (.05 / (e^.05 - 1) - .065 / (e^.065 - 1)) = 7.356266110
    errors = (torch.tensor([value], dtype=torch.float64) for value in (0.10, 0.13))
    output = MaPO(beta=0.1)(views_of_errors(*errors))
    assert output.metrics["margin"].item() == pytest.approx(7.356266110, abs=1e-8)
    assert output.metrics["supervised_term"].item() == pytest.approx(0.10)
    assert output.metrics["preference_term"].item() == pytest.approx(
        math.log1p(math.exp(-7.356266110))
    )
    assert output.loss.item() == pytest.approx(0.100063837, abs=1e-9)


@pytest.mark.parametrize("error", [1e-5, 1e-3, 0.01, 0.1, 0.99, 1.01, 4.0, 60.0])
def test_single_precision_keeps_the_score_of_small_errors(error):
    # The form of the authors' code is off by 0.15 at 1e-3 and by 0.0017 at 0.01.
    score = denoising_score(torch.tensor([error], dtype=torch.float32)).item()
    assert score == pytest.approx(exact_score(error), rel=1e-6, abs=1e-9)


def test_series_and_closed_form_meet():
    around = torch.tensor([1 - 1e-9, 1 + 1e-9], dtype=torch.float64, requires_grad=True)
    below, above = denoising_score(around)
    (slopes,) = torch.autograd.grad(below + above, around)
    assert (below - above).item() == pytest.approx(-2e-9 * slopes[0].item(), abs=1e-11)
    assert slopes[0].item() == pytest.approx(slopes[1].item(), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_perfect_prediction_scores_zero_and_has_a_gradient(dtype):
    error = torch.zeros(1, dtype=dtype, requires_grad=True)
    score = denoising_score(error)
    score.sum().backward()
    assert score.item() == 0.0
    assert error.grad.item() == pytest.approx(-250.0)  # -1000 * c / 2


def test_hopeless_errors_stay_finite():
    chosen = torch.tensor([0.0, 1e6, 1e6, 500.0], requires_grad=True)
    rejected = torch.tensor([1e6, 0.0, 1e6, 400.0], requires_grad=True)
    loss = MaPO(beta=0.1)(views_of_errors(chosen, rejected)).loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
    assert loss[1].item() == pytest.approx(1e6 + 0.1 * 1000)


def test_equal_sides_cost_the_error_and_a_coin_toss():
    error = torch.tensor([0.01, 0.2])
    output = MaPO(beta=0.1)(views_of_errors(error, error.clone()))
    expected = [0.01 + 0.1 * math.log(2), 0.2 + 0.1 * math.log(2)]
    assert output.loss.tolist() == pytest.approx(expected)
    assert output.metrics["accuracy"].tolist() == [0.5, 0.5]


def test_both_terms_reach_the_gradient():
    chosen = torch.tensor([0.01], requires_grad=True)
    rejected = torch.tensor([0.01], requires_grad=True)
    MaPO(beta=0.1)(views_of_errors(chosen, rejected)).loss.sum().backward()
    slope = 1000 * (0.5 / 2 - 0.5 * 0.005 / 6)  # c / 2 - c z / 6, with z = c * .01
    assert chosen.grad.item() == pytest.approx(1 + 0.1 * 0.5 * slope, rel=1e-5)
    assert rejected.grad.item() == pytest.approx(-0.1 * 0.5 * slope, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_a_beta_without_preference_is_refused(beta):
    with pytest.raises(ValueError, match="beta must be greater than 0"):
        MaPO(beta=beta)
