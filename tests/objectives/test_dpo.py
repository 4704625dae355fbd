from __future__ import annotations

import math

import pytest
import torch

from diffalign.likelihoods.denoising import denoising_log_likelihood
from diffalign.objectives.base import Likelihoods
from diffalign.objectives.dpo import DPO, dpo_loss
from tests.objectives.fixtures import denoised_pairs, denoised_views

PUBLISHED = {
    # Values of the DiffusionDPO authors' own loss lines, run in float64 on `denoised_pairs`:
    # beta -> loss, norm of its gradient by the prediction.
    2000.0: (0.477227831922, 4.158770909),
    5000.0: (0.487534320130, 11.502399122),
}


def margin_of(policy, reference, target) -> torch.Tensor:
    log_ratio = denoising_log_likelihood(policy, target) - denoising_log_likelihood(
        reference, target
    )
    return log_ratio[:3] - log_ratio[3:]


@pytest.mark.parametrize(
    ("dtype", "value_within", "gradient_within"),
    [(torch.float32, 1e-6, 1e-4), (torch.float64, 1e-10, 1e-8)],
)
@pytest.mark.parametrize("beta", PUBLISHED)
def test_value_and_gradient_published_by_the_authors_code(
    beta, dtype, value_within, gradient_within
):
    policy, reference, target = denoised_pairs(dtype)
    policy.requires_grad_()
    loss = dpo_loss(margin_of(policy, reference, target), beta=beta).mean()
    loss.backward()
    value, gradient_norm = PUBLISHED[beta]
    assert loss.item() == pytest.approx(value, abs=value_within)
    assert policy.grad.norm().item() == pytest.approx(gradient_norm, abs=gradient_within)


def test_logits_and_accuracy_published_by_the_authors_code():
    views = denoised_views(*denoised_pairs(torch.float64), ("chosen", "rejected"))
    metrics = DPO(beta=5000.0)(views).metrics
    expected = [3.995399647201, 2.450013824548, -1.065548642669]
    assert metrics["margin"].tolist() == pytest.approx(expected, abs=1e-9)
    assert metrics["accuracy"].mean().item() == pytest.approx(2 / 3)


def test_the_mean_is_taken_after_the_logsigmoid():
    # An early release of diffusers took logsigmoid(mean(s)), which gives 0.1539 here.
    policy, reference, target = denoised_pairs(torch.float64)
    margin = margin_of(policy, reference, target)
    assert dpo_loss(margin, beta=5000.0).mean().item() != pytest.approx(0.153932421853, abs=1e-3)
    assert dpo_loss(margin.mean(), beta=5000.0).item() == pytest.approx(0.153932421853, abs=1e-10)


def test_one_pair_worked_by_hand():
    # Errors .0100 against .0104 and .0123 against .0121: s = -.5 * 5000 * (-.0004 - .0002) = 1.5.
    margin = torch.tensor([-0.5 * (0.0100 - 0.0104) + 0.5 * (0.0123 - 0.0121)])
    assert dpo_loss(margin, beta=5000.0).item() == pytest.approx(
        math.log(1 + math.exp(-1.5)), abs=1e-6
    )


def test_gradient_worked_by_hand():
    margin = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    dpo_loss(margin, beta=0.5).sum().backward()
    # d/dm -log sigmoid(beta m) = -beta * sigmoid(-beta m)
    assert margin.grad.tolist() == pytest.approx([-0.25, -0.5 / (1 + math.e)])


def test_policy_equal_to_reference_costs_log_two_and_has_no_opinion():
    same = torch.tensor([-0.01, -0.02])
    output = DPO(beta=5000.0)(
        {"chosen": Likelihoods(same, same.clone()), "rejected": Likelihoods(same, same.clone())}
    )
    assert output.loss.tolist() == pytest.approx([math.log(2)] * 2)
    assert output.metrics["accuracy"].tolist() == [0.5, 0.5]


def test_a_constant_added_to_both_sides_changes_nothing():
    def loss(shift):
        chosen = Likelihoods(torch.tensor([1.5 + shift]), torch.tensor([1.0]))
        rejected = Likelihoods(torch.tensor([0.5 + shift]), torch.tensor([0.75]))
        return DPO(beta=2.0)({"chosen": chosen, "rejected": rejected}).loss

    assert torch.equal(loss(0.0), loss(4.0))


def test_a_more_likely_chosen_side_lowers_the_loss():
    chosen = torch.tensor([-0.01], requires_grad=True)
    rejected = torch.tensor([-0.01], requires_grad=True)
    views = {
        "chosen": Likelihoods(chosen, torch.tensor([-0.01])),
        "rejected": Likelihoods(rejected, torch.tensor([-0.01])),
    }
    DPO(beta=5000.0)(views).loss.sum().backward()
    assert chosen.grad.item() == pytest.approx(-2500.0)
    assert rejected.grad.item() == pytest.approx(2500.0)


def test_extreme_margins_stay_finite():
    margin = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    loss = dpo_loss(margin, beta=5000.0)
    loss.sum().backward()
    assert loss.isfinite().all() and margin.grad.isfinite().all()
    assert loss[0].item() == pytest.approx(5e7)


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_a_beta_that_teaches_nothing_is_refused(beta):
    with pytest.raises(ValueError, match="beta must be greater than 0"):
        DPO(beta=beta)
