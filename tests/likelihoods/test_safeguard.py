"""The safeguard of Diffusion-SDPO, against values of its authors' code: losses and gradients.

Their code adds 1e-9 to the product of the two gradients, which here is 3.3e-5; ours does not.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from diffalign.likelihoods.denoising import Denoising, NoisyViews, denoising_log_likelihood
from diffalign.objectives.base import AbstractObjective, Likelihoods
from diffalign.objectives.dpo import DPO
from diffalign.objectives.exo import EXO
from tests.objectives.fixtures import denoised_pairs, normal

PRODUCT = 3.34145969657e-05
"""Inner product of both sides' gradients where their cosine is 0.6."""
THEIRS = 1 + 1e-9 / PRODUCT
SIDES = ("chosen", "rejected")


def prepared(target: Tensor) -> NoisyViews:
    time = torch.zeros(len(target))
    return NoisyViews(views=SIDES, noisy=target, target=target, time=time, conditioning={})


def pairs(cosine: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of policy and reference and their target; the rejected half of the policy's
    residuals turned towards the chosen one."""
    policy, reference, target = denoised_pairs(torch.float64)
    if cosine is not None:
        chosen, rejected = normal(1, 6, 4, 8, 8).chunk(2)
        turned = cosine * chosen + math.sqrt(1 - cosine**2) * rejected
        policy = target + 0.1 * torch.cat([chosen, turned])
    return policy.requires_grad_(), reference, target


def evaluate(
    policy: Tensor, target: Tensor, mu: float | None
) -> tuple[dict[str, Tensor], NoisyViews, Denoising]:
    likelihood, batch = Denoising(safeguard=mu), prepared(target)
    model = SimpleNamespace(predict=lambda *_: policy)
    return likelihood.evaluate(model, batch), batch, likelihood


def step(
    objective: AbstractObjective, cosine: float | None, mu: float | None
) -> tuple[float, Tensor, float | None]:
    """Loss, its gradient in the predictions, and lambda."""
    policy, reference, target = pairs(cosine)
    values, batch, likelihood = evaluate(policy, target, mu)
    known = denoising_log_likelihood(reference, target).chunk(2)
    views = {side: Likelihoods(values[side], of) for side, of in zip(SIDES, known, strict=True)}
    loss = objective(views).loss.mean()
    loss.backward()
    share = likelihood.figures(batch).get("safeguard_lambda")
    return loss.item(), policy.grad, None if share is None else share.item()


LOSS = {None: 0.487534320130, 0.6: 0.564530941817, -0.6: 0.809981276532}
CHOSEN = {None: 7.999942554739, 0.6: 8.653780162681, -0.6: 9.667904254576}
FIRST_CHOSEN = {None: 0.019106833015, 0.6: 4.89376138173e-4, -0.6: 0.213501238787}
TABLE = [
    # cosine, mu, lambda, norm of the gradient of the rejected half, its first entry, whole norm
    (None, 0.9, 1.0, 8.264750733015, 0.025224644479, 11.502399121836),
    (None, 0.5, 1.0, 8.264750733015, 0.025224644479, 11.502399121836),
    (0.6, None, None, 8.885324377687, 2.23229793569e-4, 12.403100435002),
    (0.6, 0.9, 0.155761302588, 1.383989698981, 3.47705634227e-5, 8.763751399424),
    (0.6, 0.5, 0.778806512938, 6.919948494907, 1.73852817114e-4, 11.080324827196),
    (-0.6, 0.9, 1.0, 9.781007448652, 0.353590455363, 13.752689896388),
]


@pytest.mark.parametrize(("cosine", "mu", "share", "rejected", "first", "whole"), TABLE)
def test_values_of_the_authors_code(cosine, mu, share, rejected, first, whole):
    loss, gradient, found = step(DPO(beta=5000.0), cosine, mu)
    constant = THEIRS if share is not None and share < 1 else 1.0
    assert loss == pytest.approx(LOSS[cosine], rel=1e-10)
    assert gradient[:3].norm().item() == pytest.approx(CHOSEN[cosine], rel=1e-10)
    assert gradient[0, 0, 0, 0].item() == pytest.approx(FIRST_CHOSEN[cosine], rel=1e-8)
    assert gradient[3:].norm().item() == pytest.approx(rejected * constant, rel=1e-9)
    assert gradient[3, 0, 0, 0].item() == pytest.approx(first * constant, rel=1e-8)
    assert gradient.norm().item() == pytest.approx(
        math.hypot(CHOSEN[cosine], rejected * constant), rel=1e-9
    )
    assert gradient.norm().item() == pytest.approx(whole, rel=1e-4)
    assert found == (None if share is None else pytest.approx(share * constant, rel=1e-9))


def test_it_goes_with_any_loss_of_the_margin():
    loss, gradient, _ = step(EXO(beta=5000.0, epsilon=0.01), 0.6, 0.9)
    assert loss == pytest.approx(1.090198909282, rel=1e-9)
    assert gradient[3:].norm().item() == pytest.approx(1.603215417866 * THEIRS, rel=1e-9)
    assert gradient.norm().item() == pytest.approx(10.152285456899, rel=1e-5)


def test_values_stay_bit_for_bit_and_the_reference_is_not_guarded():
    policy, _, target = pairs(0.6)
    free, _, _ = evaluate(policy, target, None)
    guarded, batch, likelihood = evaluate(policy, target, 0.9)
    assert all(torch.equal(free[side], guarded[side]) for side in SIDES)
    with torch.no_grad():
        _, untouched, _ = evaluate(policy, target, 0.9)
    assert likelihood.row_metadata(untouched) == likelihood.figures(untouched) == {}
    overlap = likelihood.row_metadata(batch)["rejected"]["overlap"]
    expected = (policy - target)[:3] * (policy - target)[3:]
    torch.testing.assert_close(overlap, expected.detach().flatten(1).mean(1))


def test_lambda_does_not_depend_on_how_large_errors_are():
    policy, _, target = pairs(0.6)
    near = target + 1e-4 * (policy.detach() - target)
    large, small = (
        evaluate(prediction.requires_grad_(), target, 0.9)[1].figures["safeguard_lambda"]
        for prediction in (policy.detach(), near)
    )
    assert small.item() == pytest.approx(large.item(), rel=1e-9)


def test_there_is_one_lambda_for_each_micro_batch():
    policy, _, target = pairs(0.6)
    rows = [0, 3], [1, 4], [2, 5]
    alone = [
        evaluate(policy[row], target[row], 0.9)[1].figures["safeguard_lambda"].item()
        for row in rows
    ]
    assert len(set(alone)) == 3
    assert evaluate(policy, target, 0.9)[1].figures["safeguard_lambda"].shape == ()


@pytest.mark.parametrize("views", [{"chosen"}, {"chosen", "sampled"}])
def test_without_a_pair_it_is_refused(views):
    with pytest.raises(ValueError, match=r"safeguard is 0\.9, and the objective does not compare"):
        Denoising(safeguard=0.9).data_views(frozenset(views))
    assert Denoising().data_views(frozenset(views)) == views
