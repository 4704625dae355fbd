from __future__ import annotations

import pytest
import torch

from diffalign import world
from diffalign.objectives.base import Likelihoods
from diffalign.objectives.kto import KTO, kto_loss
from tests.objectives.fixtures import denoised_pairs, denoised_views
from tests.objectives.responses import numbers, plain, responses


def log_ratios(chosen: list[float], rejected: list[float]) -> dict[str, Likelihoods]:
    return {
        side: plain(values, [0.0] * len(values))
        for side, values in (("chosen", chosen), ("rejected", rejected))
    }


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_diffusion_kto_published_by_the_authors_code(dtype, within):
    # Six images, of which three are desirable; their beta of 1000 is of errors not halved.
    views = denoised_views(*denoised_pairs(dtype), ("chosen", "rejected"))
    loss = KTO(beta=2000.0)(views).loss.mean()
    assert loss.item() == pytest.approx(0.425722807033, abs=within)


def test_value_and_gradient_worked_by_hand():
    ratio = numbers([0.5]).requires_grad_()
    loss = kto_loss(ratio, numbers([0.5])[0], beta=2.0, desirable=True)
    loss.backward()
    assert loss.item() == 0.5
    assert ratio.grad.item() == pytest.approx(-2.0 * 0.25)


def test_the_baseline_is_the_mean_gain_of_both_sides_and_has_no_gradient():
    views = log_ratios([3.0, 1.0], [0.0, 2.0])
    output = KTO(beta=1.0)(views)
    output.loss.sum().backward()
    assert output.metrics["baseline"].item() == pytest.approx(1.5)
    slopes = torch.sigmoid(numbers([1.5, -0.5])) * torch.sigmoid(numbers([-1.5, 0.5]))
    assert views["chosen"].policy.grad.tolist() == pytest.approx((-slopes / 2).tolist())


def test_a_loss_on_average_is_no_baseline():
    assert KTO(beta=1.0)(log_ratios([-3.0], [-1.0])).metrics["baseline"].item() == 0.0


def test_the_baseline_is_that_of_all_ranks(monkeypatch):
    # Elsewhere, a row of each side with a log-ratio of 4.
    elsewhere = torch.tensor([1.0, 1.0, 0.0, 0.0, 4.0])
    monkeypatch.setattr(world, "total", lambda mine: mine + elsewhere)
    assert KTO(beta=1.0)(log_ratios([3.0], [1.0])).metrics["baseline"].item() == 3.0


def test_mismatched_responses_are_asked_for_and_not_trained():
    objective = KTO(beta=1.0, baseline="mismatched")
    assert objective.views == {"chosen", "rejected", "mismatched"}
    mismatched = plain([0.3], [0.0])
    objective({**responses(), "mismatched": mismatched}).loss.sum().backward()
    assert mismatched.policy.grad is None


@pytest.mark.parametrize("name", ["desirable_weight", "undesirable_weight"])
def test_a_negative_weight_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0"):
        KTO(beta=1.0, **{name: -1.0})
