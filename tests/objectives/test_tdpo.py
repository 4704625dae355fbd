from __future__ import annotations

import dataclasses

import pytest
import torch

from diffalign.objectives.base import Likelihoods
from diffalign.objectives.tdpo import TDPO
from tests.objectives.responses import responses


def moving() -> dict[str, Likelihoods]:
    """The pairs, with divergences that take gradient."""
    views = responses()
    return {
        side: dataclasses.replace(views[side], divergence=views[side].divergence.requires_grad_())
        for side in ("chosen", "rejected")
    }


@pytest.mark.parametrize(("version", "weight"), [(1, 1.0), (2, 0.5)])
def test_which_divergence_carries_gradient(version, weight):
    views = moving()
    TDPO(beta=0.5, version=version)(views).loss.sum().backward()
    slope = views["rejected"].policy.grad  # beta times the probability of being wrong
    assert torch.allclose(views["rejected"].divergence.grad, weight * slope)
    if version == 1:
        assert torch.allclose(views["chosen"].divergence.grad, -slope)
    else:
        assert views["chosen"].divergence.grad is None


def test_alpha_weighs_the_second_version_alone():
    views = moving()
    assert torch.equal(TDPO(beta=0.5, alpha=0.5)(views).loss, TDPO(beta=0.5)(views).loss)
    assert not torch.equal(TDPO(beta=0.5, alpha=0.9)(views).loss, TDPO(beta=0.5)(views).loss)
    with pytest.raises(ValueError, match="only version 2 weighs"):
        TDPO(beta=0.5, version=1, alpha=0.5)


def test_divergences_that_were_not_measured_are_asked_for():
    views = {side: dataclasses.replace(view, divergence=None) for side, view in moving().items()}
    with pytest.raises(ValueError, match="use likelihood tokens with divergence: true"):
        TDPO(beta=0.5)(views)
