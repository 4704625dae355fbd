from __future__ import annotations

import pytest
import torch

from diffalign.objectives.dspo import DSPO, dspo_loss
from tests.objectives.fixtures import denoised_gradients, denoised_pairs, denoised_views

SIDES = ("chosen", "rejected")
RELEASED = {
    # The authors' lines for SD 1.5: beta, loss, norms of the gradient of all and of rejected rows.
    0.001: (0.009983193591, 0.007207205901, 1.82601445776e-11),
    0.01: (0.009892471982, 0.007142081049, 1.80943185996e-09),
    0.05: (0.009499358212, 0.006858015728, 4.33934549553e-08),
    1.0: (0.005004394017, 0.002553285735, 1.0484190717e-06),
}


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("beta", RELEASED)
def test_values_and_gradients_of_the_authors_code(beta, dtype, within):
    expected, whole, of_rejected = RELEASED[beta]
    loss, (norm, _, rejected) = denoised_gradients(DSPO(beta=beta), dtype)
    assert loss == pytest.approx(expected, abs=within)
    assert norm == pytest.approx(whole, abs=within)
    assert rejected == pytest.approx(of_rejected, rel=100 * within)


def test_single_entries_of_the_gradient():
    policy, reference, target = denoised_pairs(torch.float64)
    policy.requires_grad_()
    DSPO(beta=0.01)(denoised_views(policy, reference, target, SIDES)).loss.mean().backward()
    found = policy.grad[0, 0, 0, 0].item(), policy.grad[3, 0, 0, 0].item()
    assert found == pytest.approx((4.18247093983e-04, -1.30744735367e-10), rel=1e-9)


def test_the_inner_product_of_the_residuals_gives_the_same():
    policy, reference, target = denoised_pairs(torch.float64)
    views = denoised_views(policy, reference, target, SIDES)
    margin = views["chosen"].log_ratio - views["rejected"].log_ratio
    gone = (0.5 * torch.sigmoid(-2000.0 * margin)).view(-1, 1, 1, 1)
    own, other = (prediction[:3] - target[:3] for prediction in (policy, reference))
    direct = (own - gone * (own - other)).square().flatten(start_dim=1).mean(dim=1)
    assert DSPO(beta=2000.0, share=0.5)(views).loss.tolist() == pytest.approx(direct.tolist())


def misuse(beta):
    """The released form at a beta of DPO, which the class refuses."""
    views = denoised_views(*denoised_pairs(torch.float64), SIDES)
    chosen, rejected = (views[side] for side in SIDES)
    margin = chosen.log_ratio - rejected.log_ratio
    errors = -2 * chosen.policy, -2 * chosen.reference
    return dspo_loss(*errors, chosen.distance, margin, beta=beta, share=beta).mean().item()


def test_a_beta_of_dpo_has_losses_of_ten_thousand_as_released_and_is_refused():
    assert misuse(2000.0) == pytest.approx(12482.222665846)
    with pytest.raises(ValueError, match=r"beta is 2000 and share is null.*give share, such"):
        DSPO(beta=2000.0)
    with pytest.raises(ValueError, match="share must be above 0 and at most 1, got 2"):
        DSPO(beta=2000.0, share=2.0)


def test_with_a_share_of_its_own_the_rejected_side_counts():
    released = denoised_gradients(DSPO(beta=0.05))[1][2]
    own = denoised_gradients(DSPO(beta=2000.0, share=0.05))[1][2]
    assert own > 1000 * released
    assert "hardly counts" in DSPO(beta=0.05).note()
    assert "hardly counts" not in DSPO(beta=2000.0, share=0.05).note()


def gated(scale, beta):
    """The released loss for SDXL, which is not built, out of what a view has; and its gate."""
    policy, reference, target = denoised_pairs(torch.float64)
    policy = (target + scale * (policy - target)).requires_grad_()
    views = denoised_views(policy, reference, target, SIDES)
    chosen, rejected = (views[side] for side in SIDES)
    wrong = torch.sigmoid(-beta * (chosen.log_ratio - rejected.log_ratio)).square()
    gate = chosen.distance.mean().item()
    loss = (wrong * chosen.distance if gate >= 0.1 else wrong).mean()
    loss.backward()
    return gate, loss.item(), policy.grad.norm().item()


@pytest.mark.parametrize(
    ("scale", "beta", "expected"),
    [
        (1.0, 5000.0, (0.020592157022, 0.186600011866, 4.364262802674)),
        (1.0, 1000.0, (0.020592157022, 0.182150129370, 1.058581749566)),
        (4.0, 5000.0, (0.171353042582, 0.112516365404, 0.024286405049)),
        (4.0, 50.0, (0.171353042582, 0.043602680474, 0.048964985302)),
    ],
)
def test_what_the_released_loss_for_sdxl_would_be(scale, beta, expected):
    assert gated(scale, beta) == pytest.approx(expected, abs=1e-10)


def test_unlike_there_nothing_jumps_and_the_prediction_always_counts():
    """A policy that moves through the gate of the released code."""
    low, high = (denoised_gradients(DSPO(beta=0.05), scale=s)[0] for s in (2.99, 3.01))
    assert high / low == pytest.approx((3.01 / 2.99) ** 2, rel=1e-2)
    # Where both sides' margins are equal, the prediction of the chosen side still has a gradient.
    error = torch.tensor([0.01], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    dspo_loss(error, error.detach(), zero, zero, beta=0.05, share=0.05).sum().backward()
    assert error.grad.item() == pytest.approx(1 - 0.05 / 2)
