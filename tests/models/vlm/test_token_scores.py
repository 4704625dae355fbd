"""Log-probabilities and divergences of tokens, worked by hand and against torch."""

from __future__ import annotations

import pytest
import torch

from diffalign.models.vlm.token_scores import token_divergence, token_log_probs

POLICY = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 3.0], [1.0, 0.0, 2.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[1.5, 1.0, 0.5], [0.5, 0.5, 2.0], [1.0, 0.5, 1.5]], dtype=torch.float64)
LABELS = torch.tensor([[0], [1], [2]])
NOISY = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.5, 0.0], [1.0, 2.0, 0.0]], dtype=torch.float64)


def test_the_published_sum_of_log_probabilities():
    assert token_log_probs(POLICY, LABELS).sum().item() == pytest.approx(-3.439085, abs=1e-6)


def test_the_published_margin_to_the_reference():
    policy, reference = token_log_probs(POLICY, LABELS), token_log_probs(REFERENCE, LABELS)
    assert (policy - reference).sum().item() == pytest.approx(-0.209564, abs=1e-6)


def test_the_published_divergence_goes_from_the_reference():
    assert token_divergence(POLICY, REFERENCE).sum().item() == pytest.approx(0.275110, abs=1e-6)
    assert token_divergence(REFERENCE, POLICY).sum().item() != pytest.approx(0.275110, abs=1e-3)


def test_the_published_score_of_tokens_chosen_next_to_noise():
    chosen = NOISY.argmax(dim=1, keepdim=True)
    assert token_log_probs(POLICY, chosen).sum().item() == pytest.approx(-6.939085, abs=1e-6)


def test_several_tokens_are_asked_for_at_once():
    both = token_log_probs(POLICY, torch.tensor([[0, 2], [1, 2], [2, 2]]))
    expected = POLICY.log_softmax(dim=1)
    assert torch.allclose(both[:, 0], expected[range(3), [0, 1, 2]])
    assert torch.allclose(both[:, 1], expected[:, 2])


def test_half_precision_is_upcast_before_the_reduction():
    logits = torch.full((1, 60_000), 4.0, dtype=torch.bfloat16)
    result = token_log_probs(logits, torch.zeros(1, 1, dtype=torch.int64))
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(-torch.tensor(60_000.0).log().item(), abs=1e-5)


def test_the_divergence_of_a_model_from_itself_is_nothing_and_has_no_slope():
    policy = POLICY.clone().requires_grad_()
    divergence = token_divergence(policy, POLICY).sum()
    divergence.backward()
    assert divergence.item() == 0
    assert policy.grad is not None and policy.grad.abs().max() < 1e-15


def test_the_slope_of_the_divergence_is_policy_minus_reference():
    policy, reference = POLICY.clone().requires_grad_(), REFERENCE.clone().requires_grad_()
    token_divergence(policy, reference).sum().backward()
    assert torch.allclose(policy.grad, POLICY.softmax(1) - REFERENCE.softmax(1))
    assert reference.grad is None
