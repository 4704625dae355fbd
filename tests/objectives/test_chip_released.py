from __future__ import annotations

import dataclasses

import pytest
import torch

from diffalign.objectives.chip_released import ReleasedCHiP
from tests.objectives.responses import responses


def test_the_chosen_response_pulls_twice_and_the_spoilt_image_once():
    views = responses()
    ReleasedCHiP(beta=0.5, token_beta=0.0)(views).loss.sum().backward()
    slope = views["rejected"].policy.grad
    assert torch.allclose(views["chosen"].policy.grad, -2 * slope)
    assert torch.allclose(views["chosen@diffuse"].policy.grad, slope)


def test_the_divergence_of_the_chosen_side_is_held():
    views = responses()
    for side in ("chosen", "rejected"):
        divergence = views[side].divergence.requires_grad_()
        views[side] = dataclasses.replace(views[side], divergence=divergence)
    ReleasedCHiP(beta=0.5, token_beta=0.2)(views).loss.sum().backward()
    slope = views["rejected"].policy.grad
    assert torch.allclose(views["rejected"].divergence.grad, 0.2 * slope)
    assert views["chosen"].divergence.grad is None


def test_divergences_are_needed_only_where_they_count():
    assert ReleasedCHiP(beta=0.1).needs_divergence
    assert not ReleasedCHiP(beta=0.1, token_beta=0.0).needs_divergence
    with pytest.raises(ValueError, match="token_beta must be at least 0"):
        ReleasedCHiP(beta=0.1, token_beta=-0.1)


def test_the_condition_is_a_setting():
    assert "chosen@blur" in ReleasedCHiP(beta=0.1, condition="blur").views
