from __future__ import annotations

import math

import pytest
import torch

from diffalign.objectives.exo import EXO, exo_loss
from tests.objectives.fixtures import denoised_gradients
from tests.objectives.responses import numbers


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-6), (torch.float64, 1e-10)])
def test_dmpo_published_by_the_authors_of_its_safeguard(dtype, within):
    # Divergence minimisation of image pairs is this loss at an epsilon of 0.01.
    loss, (norm, *_) = denoised_gradients(EXO(beta=5000.0, epsilon=0.01), dtype)
    assert loss == pytest.approx(0.986301569718, abs=within)
    assert norm == pytest.approx(16.753700804521, rel=10 * within)


def test_it_is_zero_where_the_implied_preference_is_the_labelled_one():
    margin = numbers([math.log(0.9 / 0.1), 0.0]).requires_grad_()
    loss = exo_loss(margin, beta=1.0, epsilon=0.1)
    loss.sum().backward()
    # At 0: KL of (1/2, 1/2) from (.9, .1) is log(1/2) - log(.3); its slope is -log(9) / 4.
    assert loss.tolist() == pytest.approx([0.0, math.log(0.5) - math.log(0.3)], abs=1e-12)
    assert margin.grad.tolist() == pytest.approx([0.0, -math.log(9) / 4], abs=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_a_certain_or_empty_label_is_refused(epsilon):
    with pytest.raises(ValueError, match=r"epsilon must be above 0 and below 0\.5"):
        EXO(beta=0.1, epsilon=epsilon)
