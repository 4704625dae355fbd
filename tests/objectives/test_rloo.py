"""Values and gradients of TRL 1.16 (`RLOOTrainer._compute_loss`) on six sampled responses."""

from __future__ import annotations

import pytest
import torch

from diffalign.objectives.rloo import RLOO
from tests.objectives.responses import sampled_responses

LEAVE_ONE_OUT = [0.65, -0.55, -0.1, -1.5, 1.5, 0.0]
LESS_DIVERGENCE = [0.67, -0.5675, -0.1025, -1.5275, 1.5625, -0.035]
"""Rewards less 0.1 times the log-ratio of old policy to reference."""


@pytest.mark.parametrize(
    ("advantage", "loss", "moved"),
    [
        (LEAVE_ONE_OUT, -0.133015540857, 0.023651126),
        (LESS_DIVERGENCE, -0.138257596045, 0.024242404),
    ],
)
def test_value_and_gradient(advantage, loss, moved):
    view = sampled_responses(advantage=advantage)
    assert view.tokens is not None
    found = RLOO()({"sampled": view}).loss.mean()
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-11)
    # All other ratios are beyond the range on the side that their advantage asks for.
    gradient = view.tokens.policy.grad
    assert gradient is not None
    assert gradient[2].tolist() == pytest.approx([moved] * 4, abs=1e-9)
    if advantage is LEAVE_ONE_OUT:
        assert not gradient[[0, 1, 3, 4, 5]].any()


def test_ratios_are_those_of_whole_responses():
    figures = RLOO()({"sampled": sampled_responses(advantage=LEAVE_ONE_OUT)}).metrics
    assert figures["ratio"].tolist() == pytest.approx(
        [
            1.349858807576,
            0.778800783071,
            1.419067548593,
            0.740818220682,
            1.349858807576,
            0.778800783071,
        ]
    )
    assert figures["clipped"].tolist() == [1, 1, 0, 1, 1, 0]


def test_straight_after_sampling_the_gradient_is_minus_the_advantage():
    view = sampled_responses(old=False, advantage=LEAVE_ONE_OUT)
    assert view.tokens is not None
    RLOO()({"sampled": view}).loss.sum().backward()
    gradient = view.tokens.policy.grad
    assert gradient is not None
    assert torch.equal(gradient[:, 0], -torch.tensor(LEAVE_ONE_OUT, dtype=torch.float64))
