from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from diffalign.objectives.dpo import DPO
from diffalign.objectives.smpo import SmPO
from tests.objectives.fixtures import denoised_pairs, denoised_views
from tests.objectives.responses import numbers

SIDES = ("chosen", "rejected")
RANGE = 0.28201571106910706 - 0.11543526500463486
"""Of the scores of PickScore, in the authors' code."""


def probability(chosen: float, rejected: float) -> float:
    return 1 / (1 + math.exp((rejected - chosen) / RANGE))


def run(preferences, dtype=torch.float64, **settings):
    """Mean loss of the pairs, and the gradient in the predictions."""
    policy, reference, target = denoised_pairs(dtype)
    policy.requires_grad_()
    views = denoised_views(policy, reference, target, SIDES)
    known = torch.tensor(preferences, dtype=dtype)
    sure = {side: dataclasses.replace(view, preference=known) for side, view in views.items()}
    loss = SmPO(beta=5000.0, **settings)(sure).loss.mean()
    loss.backward()
    return loss.item(), policy.grad


def test_scores_as_probabilities():
    assert probability(0.22, 0.20) == pytest.approx(0.529979523711, abs=1e-10)
    assert probability(0.25, 0.18) == pytest.approx(0.603535267824, abs=1e-10)
    assert 10 * (2 * probability(0.22, 0.20) - 1) == pytest.approx(0.599590474221, abs=1e-10)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_value_and_gradient_of_the_authors_code(dtype, within):
    loss, gradient = run([probability(0.22, 0.20)] * 3, dtype)
    assert loss == pytest.approx(0.452371315989, abs=within)
    norms = [part.norm().item() for part in (gradient, *gradient.chunk(2))]
    known = [6.294704533332, 4.386584818361, 4.514551892854]
    assert norms == pytest.approx(known, rel=10 * within)
    first = gradient[0, 0, 0, 0].item(), gradient[3, 0, 0, 0].item()
    assert first == pytest.approx((0.052950843592, 0.069905159242), rel=10 * within)


def test_each_pair_has_its_own_probability_and_not_that_of_the_first():
    loss, gradient = run([0.55, 0.9, 0.9])
    assert loss == pytest.approx(2.847606849565, abs=1e-10)
    assert gradient.norm().item() == pytest.approx(123.037618479944, rel=1e-9)
    # The first one's for all is plain DPO here, which is what the released loss gives.
    assert run([0.55] * 3)[0] == pytest.approx(0.487534320130, abs=1e-10)
    views = denoised_views(*denoised_pairs(torch.float64), SIDES)
    assert DPO(beta=5000.0)(views).loss.mean().item() == pytest.approx(0.487534320130, abs=1e-10)


def test_an_undecided_pair_teaches_nothing():
    loss, gradient = run([0.5] * 3)
    assert loss == pytest.approx(math.log(2)) and not gradient.any()


def test_a_label_that_is_probably_wrong_is_learnt_the_other_way_round():
    policy, reference, target = denoised_pairs(torch.float64)
    views = denoised_views(policy, reference, target, SIDES)
    sure = {
        side: dataclasses.replace(view, preference=numbers([0.2, 0.4, 0.7]))
        for side, view in views.items()
    }
    exchanged = {
        side: dataclasses.replace(views[other], preference=numbers([0.8, 0.6, 0.3]))
        for side, other in zip(SIDES, reversed(SIDES), strict=True)
    }
    objective = SmPO(beta=5000.0)
    assert objective(sure).loss.tolist() == pytest.approx(objective(exchanged).loss.tolist())


def test_the_beta_of_a_certain_pair_is_told():
    assert "certain pair is 50000" in SmPO(beta=5000.0).note()
    with pytest.raises(ValueError, match=r"scale must be greater than 0"):
        SmPO(beta=5000.0, scale=0.0)
