"""Log-probabilities by a head, next to those that autograd differentiates."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from diffalign.models.vlm import vocabulary_head
from diffalign.models.vlm.token_scores import token_log_probs
from diffalign.models.vlm.vocabulary_head import head_log_probs

POSITIONS, WIDTH, WORDS = 7, 5, 11


def inputs(dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(WORDS, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(WORDS, generator=generator, dtype=torch.float64)
    targets = torch.randint(WORDS, (POSITIONS,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), bias.to(dtype), targets


def found(hidden, weight, bias, targets, *, at_once=3):
    values = head_log_probs(hidden, weight, bias, targets, positions_at_once=at_once)
    upstream = torch.arange(1.0, POSITIONS + 1, dtype=values.dtype)
    (gradient,) = torch.autograd.grad((values * upstream).sum(), hidden)
    return values.detach(), gradient


def expected(hidden, weight, bias, targets):
    values = token_log_probs(linear(hidden, weight, bias), targets[:, None])[:, 0]
    upstream = torch.arange(1.0, POSITIONS + 1, dtype=values.dtype)
    (gradient,) = torch.autograd.grad((values * upstream).sum(), hidden)
    return values.detach(), gradient


@pytest.mark.parametrize("at_once", [1, 3, 7, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_autograd(at_once, with_bias):
    hidden, weight, bias, targets = inputs()
    bias = bias if with_bias else None
    for own, theirs in zip(
        found(hidden, weight, bias, targets, at_once=at_once),
        expected(hidden, weight, bias, targets),
        strict=True,
    ):
        assert torch.allclose(own, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_head_that_trains_has_the_gradients_of_autograd(with_bias):
    hidden, weight, bias, targets = inputs()
    trained = [hidden, weight.requires_grad_(), *([bias.requires_grad_()] if with_bias else [])]
    bias = bias if with_bias else None
    upstream = torch.arange(1.0, POSITIONS + 1, dtype=torch.float64)
    own = head_log_probs(hidden, weight, bias, targets, positions_at_once=3)
    theirs = token_log_probs(linear(hidden, weight, bias), targets[:, None])[:, 0]
    for mine, other in zip(
        torch.autograd.grad((own * upstream).sum(), trained),
        torch.autograd.grad((theirs * upstream).sum(), trained),
        strict=True,
    ):
        assert torch.allclose(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trained", [True, False])
def test_bounded_logits_have_the_values_and_gradients_of_autograd(trained):
    hidden, weight, bias, targets = inputs(scale=2.0)
    by = [hidden, *([weight.requires_grad_()] if trained else [])]
    upstream = torch.arange(1.0, POSITIONS + 1, dtype=torch.float64)
    own = head_log_probs(hidden, weight, bias, targets, positions_at_once=3, softcap=1.5)
    logits = 1.5 * torch.tanh(linear(hidden, weight, bias) / 1.5)
    theirs = token_log_probs(logits, targets[:, None])[:, 0]
    assert torch.allclose(own, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad((own * upstream).sum(), by),
        torch.autograd.grad((theirs * upstream).sum(), by),
        strict=True,
    ):
        assert torch.allclose(mine, other, rtol=1e-12, atol=1e-12)


def test_the_values_do_not_depend_on_whether_the_head_trains():
    hidden, weight, bias, targets = inputs(torch.float32)
    frozen, _ = found(hidden, weight, bias, targets)
    trained, _ = found(hidden, weight.requires_grad_(), bias, targets)
    assert torch.equal(frozen, trained)


def test_no_logit_is_computed_twice_where_the_head_does_not_train(monkeypatch):
    rows = []
    compute = vocabulary_head._logits
    monkeypatch.setattr(
        vocabulary_head, "_logits", lambda *some: rows.append(len(some[0])) or compute(*some)
    )
    arguments = inputs()
    found(*arguments)
    assert rows == [3, 3, 1]
    arguments[1].requires_grad_()
    found(*arguments)
    assert rows == [3, 3, 1] * 3


def test_the_gradient_is_that_of_finite_differences():
    hidden, weight, bias, targets = inputs()
    assert torch.autograd.gradcheck(
        lambda some: head_log_probs(some, weight, bias, targets, positions_at_once=2), [hidden]
    )


def test_in_half_precision_the_gradient_of_a_token_that_is_nearly_certain_is_as_good():
    """Its slope by the logit is what is left of 1: rounded before, nothing of it would be."""
    hidden, weight, bias, _ = inputs(torch.float32, scale=6.0)
    targets = linear(hidden, weight, bias).argmax(dim=1)
    _, exact = expected(hidden.double().detach().requires_grad_(), weight.double(), None, targets)
    with torch.autocast("cpu", torch.bfloat16):
        _, own = found(hidden, weight, None, targets)
        _, theirs = expected(hidden, weight, None, targets)
    assert own.dtype == torch.float32
    assert (own - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_without_gradient_the_values_are_the_same_and_nothing_is_kept():
    arguments = inputs()
    with torch.no_grad():
        values = head_log_probs(*arguments, positions_at_once=3)
    assert not values.requires_grad
    assert torch.equal(values, found(*arguments)[0])


def test_no_positions_have_no_log_probabilities():
    hidden, weight, bias, targets = inputs()
    assert len(head_log_probs(hidden[:0], weight, bias, targets[:0], positions_at_once=3)) == 0
