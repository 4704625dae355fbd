from __future__ import annotations

import math

import pytest
import torch

from diffalign.objectives.base import Likelihoods
from diffalign.objectives.dpo import DPO
from diffalign.objectives.seppo import SePPO, anchor_sign
from tests.objectives.fixtures import denoised_pairs, denoised_views

EXPECTED = {
    # No code of the authors is public. These follow from the formula, on `denoised_pairs` at beta
    # 5000, worked out independently of this package; the last is published for DPO.
    "sign": 1.347703133355,
    "indicator": 0.891458534226,
    "none": 0.487534320130,
}


def views_of(chosen: torch.Tensor, sampled: torch.Tensor) -> dict[str, Likelihoods]:
    """Views with these log-ratios."""
    return {
        "chosen": Likelihoods(chosen, torch.zeros_like(chosen)),
        "sampled": Likelihoods(sampled, torch.zeros_like(sampled)),
    }


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("anchor", EXPECTED)
def test_value_of_every_form(anchor, dtype, within):
    views = denoised_views(*denoised_pairs(dtype), ("chosen", "sampled"))
    output = SePPO(beta=5000.0, anchor=anchor)(views)
    assert output.loss.mean().item() == pytest.approx(EXPECTED[anchor], abs=within)
    flipped = [0.0, 0.0, 0.0 if anchor == "none" else 1.0]
    assert output.metrics["flipped"].tolist() == flipped


def test_without_its_anchor_it_is_dpo():
    pairs = denoised_pairs(torch.float64)
    loss = SePPO(beta=5000.0, anchor="none")(denoised_views(*pairs, ("chosen", "sampled"))).loss
    dpo = DPO(beta=5000.0)(denoised_views(*pairs, ("chosen", "rejected"))).loss
    assert torch.equal(loss, dpo)


@pytest.mark.parametrize(
    ("error_change_chosen", "error_change_sampled", "expected"),
    [(0.0004, -0.0002, 0.974077), (-0.0002, 0.0002, 0.313262)],
)
def test_one_pair_worked_by_hand(error_change_chosen, error_change_sampled, expected):
    # Behind: -2500 * (.0004 + 1 * -.0002) = -.5. Ahead: -2500 * (-.0002 - .0002) = 1.
    views = views_of(double(-error_change_chosen / 2), double(-error_change_sampled / 2))
    assert SePPO(beta=5000.0)(views).loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("anchor", "behind"),
    [("sign", [-0.5, -0.5]), ("indicator", [-0.5, 0.0]), ("none", [-0.5, 0.5])],
)
def test_gradient_where_the_reference_is_ahead(anchor, behind):
    # At beta 1 and log-ratios of about 0 each side has a slope of one half: learnt, left, pushed.
    chosen, sampled = double(-1e-12), double(0.0)
    SePPO(beta=1.0, anchor=anchor)(views_of(chosen, sampled)).loss.sum().backward()
    assert [chosen.grad.item(), sampled.grad.item()] == pytest.approx(behind, abs=1e-9)


@pytest.mark.parametrize("anchor", EXPECTED)
def test_a_tie_pushes_away_as_where_the_policy_is_ahead(anchor):
    chosen, sampled = double(0.0, 1e-12), double(0.0, 0.0)
    output = SePPO(beta=1.0, anchor=anchor)(views_of(chosen, sampled))
    output.loss.sum().backward()
    assert output.loss[0].item() == pytest.approx(math.log(2))
    assert chosen.grad.tolist() == pytest.approx([-0.5, -0.5])
    assert sampled.grad.tolist() == pytest.approx([0.5, 0.5])
    assert output.metrics["flipped"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("anchor", "behind"), [("sign", -1), ("indicator", 0), ("none", 1)])
def test_the_anchor_looks_at_the_chosen_image_alone(anchor, behind):
    signs = anchor_sign(double(-2.0, 0.0, 2.0), anchor=anchor)
    assert signs.tolist() == [behind, 1, 1]
    assert signs.dtype == torch.float64 and not signs.requires_grad


def test_beta_of_zero_is_refused():
    with pytest.raises(ValueError, match="beta must be greater than 0"):
        SePPO(beta=0.0)
