from __future__ import annotations

import math

import pytest

from diffalign.objectives.discopop import DiscoPOP, discopop_loss
from tests.objectives.responses import numbers, responses

PUBLISHED = {
    # TRL's DPOTrainer: beta, temperature -> each pair, the mean, and the slope of the mean in one
    # token of each chosen response; that of the rejected ones is the opposite.
    (0.5, 0.05): (
        [0.606524646598, 0.805751782555, 0.637610336011],
        0.683295588388,
        [-0.101066667871, -0.068732209948, -0.106206874754],
    ),
    (0.5, 1.0): (
        [0.556524010467, 0.988677882275, 0.581412553518],
        0.708871482087,
        [-0.081491753325, -0.124564432468, -0.084439187071],
    ),
    (0.1, 0.05): (
        [0.873792118673, 0.814869241889, 0.876373016926],
        0.855011459163,
        [-0.010223661448, 0.024212961662, -0.006913835537],
    ),
}


@pytest.mark.parametrize("settings", PUBLISHED)
def test_published_values_and_gradients(settings):
    beta, temperature = settings
    each, mean, slopes = PUBLISHED[settings]
    views = responses()
    loss = DiscoPOP(beta=beta, temperature=temperature)(views).loss
    loss.mean().backward()
    assert loss.tolist() == pytest.approx(each, abs=1e-10)
    assert loss.mean().item() == pytest.approx(mean, abs=1e-10)
    assert views["chosen"].policy.grad.tolist() == pytest.approx(slopes, abs=1e-10)
    assert views["rejected"].policy.grad.tolist() == pytest.approx([-s for s in slopes], abs=1e-10)


def test_a_run_is_told_where_its_loss_rises():
    low, high = DiscoPOP(beta=0.1).rising()
    assert low == pytest.approx(-0.1185) and high == pytest.approx(0.072)
    # The second pair above, at 0.1 * -0.4, lies in there; the others, at 0.1 and 0.09, do not.
    assert "between -0.12 and 0.072 are pushed the wrong way" in DiscoPOP(beta=0.1).note()


@pytest.mark.parametrize("temperature", [0.2, 0.5, 1.0])
def test_a_higher_temperature_falls_everywhere(temperature):
    objective = DiscoPOP(beta=0.1, temperature=temperature)
    assert objective.rising() is None and objective.note() == ""


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
def test_pairs_very_far_on_either_side_have_finite_losses_and_gradients(temperature):
    margin = numbers([-1e6, 1e6]).float().requires_grad_()
    loss = discopop_loss(margin, beta=1.0, temperature=temperature)
    loss.sum().backward()
    assert loss.isfinite().all() and margin.grad.isfinite().all()


def test_without_an_opinion_both_parts_count_half():
    loss = discopop_loss(numbers([0.0]), beta=1.0, temperature=0.05)
    assert loss.item() == pytest.approx((math.log(2) + 1) / 2)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_temperature_outside_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0 and at most 1"):
        DiscoPOP(beta=0.1, temperature=temperature)
