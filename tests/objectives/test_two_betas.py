from __future__ import annotations

import dataclasses

import pytest
import torch

from diffalign.objectives.base import Likelihoods
from diffalign.objectives.dpo import DPO
from diffalign.objectives.two_betas import TwoBetas, two_beta_loss
from tests.objectives.fixtures import denoised_gradients, denoised_pairs, denoised_views
from tests.objectives.responses import numbers, responses

SIDES = ("chosen", "rejected")


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    ("betas", "expected", "gradients"),
    [
        ((5000.0, 2500.0), 0.724486581313, (10.563707922238, 9.389322448815, 4.840717820585)),
        ((2000.0, 8000.0), 0.203543464030, (6.105220283242, None, None)),
        ((5000.0, 5000.0), 0.487534320130, (11.502399121836, 7.999942554739, 8.264750733015)),
    ],
)
def test_values_and_gradients_on_denoising_errors(betas, expected, gradients, dtype, within):
    objective = TwoBetas(beta=betas[0], beta_rejected=betas[1])
    loss, found = denoised_gradients(objective, dtype)
    assert loss == pytest.approx(expected, abs=within)
    for norm, known in zip(found, gradients, strict=True):
        assert known is None or norm == pytest.approx(known, rel=10 * within)


def test_logits_are_the_margins_of_the_log():
    views = denoised_views(*denoised_pairs(torch.float64), SIDES)
    metrics = TwoBetas(beta=2000.0, beta_rejected=8000.0)(views).metrics
    known = [0.909039095283, 3.544249716370, 1.287956172940]
    assert metrics["margin"].tolist() == pytest.approx(known, abs=1e-10)
    assert metrics["accuracy"].tolist() == [1.0, 1.0, 1.0]
    assert (metrics["chosen_reward"] - metrics["rejected_reward"]).tolist() == pytest.approx(known)


def test_equal_betas_are_dpo():
    views = responses()
    assert torch.equal(TwoBetas(beta=0.5, beta_rejected=0.5)(views).loss, DPO(beta=0.5)(views).loss)


def test_what_both_sides_gain_alike_is_not_nothing():
    ratios = numbers([0.6, -0.1]), numbers([-0.4, 0.3])
    betas = {"beta_chosen": 0.5, "beta_rejected": 0.1}
    before = two_beta_loss(*ratios, **betas)
    after = two_beta_loss(*(ratio + 10.0 for ratio in ratios), **betas)
    assert (after < before).all()  # by 10 * (0.5 - 0.1) in the logit


def test_a_beta_goes_with_the_part_and_not_with_the_view():
    chosen, rejected = (responses()[side] for side in SIDES)
    objective = TwoBetas(beta=0.5, beta_rejected=0.1)
    exchanged = objective.pair_loss(rejected, chosen).loss
    expected = -torch.nn.functional.logsigmoid(0.5 * rejected.log_ratio - 0.1 * chosen.log_ratio)
    assert exchanged.tolist() == pytest.approx(expected.tolist())


def test_accuracy_of_pairs_whose_label_is_probably_wrong_is_turned():
    views = responses()
    sides = [views[side] for side in SIDES]
    wrong = {
        side: dataclasses.replace(view, preference=numbers([0.2, 0.5, 0.9]))
        for side, view in zip(SIDES, sides, strict=True)
    }
    objective = TwoBetas(beta=0.5, beta_rejected=0.1)
    plain = objective(dict(zip(SIDES, sides, strict=True))).metrics["accuracy"].tolist()
    turned = objective(wrong).metrics["accuracy"].tolist()
    assert turned == [1 - plain[0], 0.5, plain[2]]


def test_a_beta_of_zero_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"beta_rejected must be greater than 0, got 0\.0"):
        TwoBetas(beta=1.0, beta_rejected=0.0)


def test_the_family_before_the_first_step():
    same = numbers([-2.0, -30.0])
    views = {side: Likelihoods(same, same) for side in SIDES}
    loss = TwoBetas(beta=0.5, beta_rejected=0.1)(views).loss
    assert loss.tolist() == pytest.approx([0.6931471805599453] * 2)
