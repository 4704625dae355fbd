from __future__ import annotations

import math

import pytest
import torch

from diffalign.objectives.cdpo import ConservativeDPO, cdpo_loss
from diffalign.objectives.dpo import dpo_loss
from tests.objectives.responses import numbers

REWARDS = numbers([1.5, -0.5, 0.0, 4.0])


def test_value_published_for_denoising_errors():
    loss = cdpo_loss(REWARDS, beta=1.0, label_smoothing=0.1).mean()
    assert loss.item() == pytest.approx(0.596696842650, abs=1e-10)


def test_the_loss_is_lowest_where_the_policy_is_as_sure_as_the_labels():
    margin = numbers([math.log(0.8 / 0.2)]).requires_grad_()
    cdpo_loss(margin, beta=1.0, label_smoothing=0.2).sum().backward()
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_without_smoothing_it_is_dpo():
    loss = cdpo_loss(REWARDS, beta=0.7, label_smoothing=0.0)
    assert torch.equal(loss, dpo_loss(REWARDS, beta=0.7))


@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5])
def test_labels_that_say_nothing_are_refused(label_smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing must be at least 0 and below 0\.5"):
        ConservativeDPO(beta=0.1, label_smoothing=label_smoothing)
