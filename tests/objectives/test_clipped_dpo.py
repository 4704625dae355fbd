from __future__ import annotations

import math

import pytest
import torch

from diffalign.objectives.base import Likelihoods
from diffalign.objectives.clipped_dpo import ClippedDPO, clipped_log_ratio
from tests.objectives.fixtures import candidate_steps, sampled_steps

D3PO = {
    # Values of the D3PO authors' own loss lines on `sampled_steps`, whose first row is won by the
    # first trajectory, the second by the second, and whose third is a tie: (beta, clip) -> mean.
    (0.1, 0.1): 0.693182400385,
    (1.0, 0.1): 0.693499466289,
    (1.0, 0.002): 0.693473509299,
    (1.0, 0.0005): math.log(2),  # all ratios lie beyond the range
}
SPO = {
    # The same of the SPO authors on `candidate_steps`, whose first side is chosen everywhere.
    (10.0, 0.1): 0.708723127991,
    (10.0, 0.002): 0.706913539785,
}
RATIOS = (
    # Ratios of both trajectories of `sampled_steps`, as the D3PO authors' code has them.
    [0.998456374861, 0.999123150198, 0.997449493847],
    [0.999288150321, 0.997844675032, 0.999406454601],
)


def views_of(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, Likelihoods]:
    """Views with these log-ratios."""
    return {
        "chosen": Likelihoods(chosen, torch.zeros_like(chosen)),
        "rejected": Likelihoods(rejected, torch.zeros_like(rejected)),
    }


def d3po_loss(objective: ClippedDPO, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Mean over the three rows; a tie is log 2 whatever the ratios, and so never trained."""
    chosen, rejected = torch.stack([first[0], second[1]]), torch.stack([second[0], first[1]])
    return (objective(views_of(chosen, rejected)).loss.sum() + math.log(2)) / 3


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("beta", "clip"), D3PO)
def test_d3po_published_by_the_authors_code(beta, clip, dtype, within):
    first, second = (step.log_ratio().to(dtype) for step in sampled_steps())
    loss = d3po_loss(ClippedDPO(beta=beta, clip=clip), first, second)
    assert loss.item() == pytest.approx(D3PO[beta, clip], abs=within)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("beta", "clip"), SPO)
def test_spo_published_by_the_authors_code(beta, clip, dtype, within):
    chosen, rejected = (step.log_ratio().to(dtype) for step in candidate_steps())
    loss = ClippedDPO(beta=beta, clip=clip)(views_of(chosen, rejected)).loss.mean()
    assert loss.item() == pytest.approx(SPO[beta, clip], abs=within)


def test_the_ratios_of_the_fixture_are_the_published_ones():
    for step, published in zip(sampled_steps(), RATIOS, strict=True):
        assert step.log_ratio().exp().tolist() == pytest.approx(published, abs=1e-11)


def test_a_clamped_side_alone_loses_its_gradient():
    # Published: at clip .002 the second trajectory's ratio .9978 of row 1 is clamped.
    first, second = sampled_steps()
    loss = d3po_loss(ClippedDPO(beta=1.0, clip=0.002), first.log_ratio(), second.log_ratio())
    loss.backward()
    assert second.policy.grad[1].abs().max() == 0
    assert second.policy.grad[0].abs().max() > 0
    assert first.policy.grad[:2].flatten(start_dim=1).norm(dim=1).min() > 0


def test_no_gradient_is_left_where_all_ratios_are_clamped():
    first, second = sampled_steps()
    loss = d3po_loss(ClippedDPO(beta=1.0, clip=0.0005), first.log_ratio(), second.log_ratio())
    loss.backward()
    assert first.policy.grad.abs().max() == 0
    assert second.policy.grad.abs().max() == 0


@pytest.mark.parametrize("log_ratio", [-0.2, 0.2])
def test_the_clamp_has_no_gradient_on_either_side_of_the_range(log_ratio):
    for values in ([log_ratio, 0.0], [0.0, log_ratio]):
        chosen, rejected = (
            torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in values
        )
        ClippedDPO(beta=1.0)(views_of(chosen, rejected)).loss.sum().backward()
        gradients = [side.grad.item() for side in (chosen, rejected)]
        assert [gradient == 0 for gradient in gradients] == [value != 0 for value in values]


def test_one_pair_worked_by_hand():
    # Log-ratios .02 and -.15; the second ratio, .861, is clamped to .9: .1 * (.02 - log .9).
    output = ClippedDPO(beta=0.1)(views_of(torch.tensor([0.02]), torch.tensor([-0.15])))
    logit = 0.1 * (0.02 - math.log(0.9))
    assert output.loss.item() == pytest.approx(math.log1p(math.exp(-logit)), abs=1e-6)
    assert output.loss.item() == pytest.approx(0.686898799, abs=1e-6)
    assert output.metrics["abs_log_ratio"].item() == pytest.approx(0.085)
    assert output.metrics["margin"].item() == pytest.approx(logit)


def test_the_clipped_share_counts_both_sides():
    chosen, rejected = torch.tensor([0.05, 0.3, -0.3]), torch.tensor([0.0, 0.0, 0.3])
    output = ClippedDPO(beta=0.1)(views_of(chosen, rejected))
    assert output.metrics["clipped"].tolist() == [0.0, 0.5, 1.0]


def test_the_range_is_of_the_ratio_not_of_its_logarithm():
    held = clipped_log_ratio(torch.tensor([-9.0, 0.05, 9.0], dtype=torch.float64), clip=0.1)
    assert held.exp().tolist() == pytest.approx([0.9, math.exp(0.05), 1.1], abs=1e-15)


@pytest.mark.parametrize(
    ("beta", "low", "high"), [(0.1, "0.683", "0.703"), (10.0, "0.126", "2.133")]
)
def test_a_flat_loss_is_explained_before_it_is_seen(beta, low, high):
    objective = ClippedDPO(beta=beta)
    assert f"between {low} and {high}" in objective.note()
    extremes = torch.tensor([-5.0, 5.0], dtype=torch.float64)
    losses = objective(views_of(extremes, -extremes)).loss.tolist()
    assert [f"{loss:.3f}" for loss in losses] == [high, low]


def test_a_huge_beta_has_a_note_too():
    assert "between 0.000 and 1003.353" in ClippedDPO(beta=5000.0).note()


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_a_beta_that_teaches_nothing_is_refused(beta):
    with pytest.raises(ValueError, match="beta must be greater than 0"):
        ClippedDPO(beta=beta)


@pytest.mark.parametrize("clip", [0.0, 1.0, -0.1])
def test_a_clip_that_is_no_range_is_refused(clip):
    with pytest.raises(ValueError, match="clip must be above 0 and below 1"):
        ClippedDPO(beta=10.0, clip=clip)
