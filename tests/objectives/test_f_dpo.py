from __future__ import annotations

import pytest
import torch

from diffalign.objectives.dpo import DPO, dpo_loss
from diffalign.objectives.f_dpo import DivergenceDPO, divergence_score
from tests.objectives.responses import numbers, responses

PUBLISHED = {
    # On log-ratios of the diffusion fixtures, in units in which they are nats.
    ("forward_kl", None): 0.475258235246,
    ("js", None): 0.514720908774,
    ("alpha", 0.5): 0.474718931275,
}


@pytest.mark.parametrize(("divergence", "alpha"), PUBLISHED)
def test_value_published_for_denoising_errors(divergence, alpha):
    chosen, rejected = (
        divergence_score(numbers(values), divergence=divergence, alpha=alpha)
        for values in ([1.0, -0.2, 0.3, 2.0], [-0.5, 0.3, 0.3, -2.0])
    )
    loss = dpo_loss(chosen - rejected, beta=1.0).mean()
    assert loss.item() == pytest.approx(PUBLISHED[divergence, alpha], abs=1e-11)


def test_the_reverse_divergence_is_dpo():
    for settings in ({"divergence": "reverse_kl"}, {"divergence": "alpha", "alpha": 1.0}):
        loss = DivergenceDPO(beta=0.5, **settings)(responses()).loss
        assert torch.equal(loss, DPO(beta=0.5)(responses()).loss)


def test_alpha_zero_is_the_forward_divergence():
    ratio = numbers([-1.0, 0.0, 2.0])
    forward = divergence_score(ratio, divergence="forward_kl")
    assert torch.equal(divergence_score(ratio, divergence="alpha", alpha=0.0), forward)
    assert torch.allclose(forward, -(-ratio).exp())


def test_the_scale_comes_before_the_divergence_and_beta_after():
    views = responses()
    chosen, rejected = (3 * views[side].log_ratio for side in ("chosen", "rejected"))
    expected = dpo_loss(-(-chosen).exp() + (-rejected).exp(), beta=0.5)
    loss = DivergenceDPO(beta=0.5, scale=3.0, divergence="forward_kl")(views).loss
    assert torch.allclose(loss, expected)


@pytest.mark.parametrize("settings", [{"divergence": "alpha"}, {"divergence": "js", "alpha": 0.5}])
def test_alpha_belongs_to_its_divergence(settings):
    with pytest.raises(ValueError, match="alpha belongs to divergence alpha"):
        DivergenceDPO(beta=0.1, **settings)


def test_a_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match="scale must be greater than 0"):
        DivergenceDPO(beta=0.1, divergence="js", scale=0.0)


def test_a_scale_is_said():
    assert DivergenceDPO(beta=1.0, divergence="js").note() == ""
    assert "multiplied by 2000" in DivergenceDPO(beta=1.0, divergence="js", scale=2000.0).note()
