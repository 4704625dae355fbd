"""Values of the authors' `dpo_pl5_loss` on three pairs, each next to five images."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.objectives.anchor import Anchor
from diffalign.objectives.dpo import DPO
from diffalign.objectives.plackett_luce import PlackettLuce, ranking_loss
from diffalign.objectives.weighted_sum import Term, WeightedSum
from tests.objectives.responses import numbers, plain, responses

POLICY = [
    [-2.5, -2.7, -2.9, -3.2, -3.4],
    [-1.1, -1.2, -1.4, -1.3, -1.6],
    [-4.4, -4.5, -4.6, -4.9, -5.0],
]
REFERENCE = [
    [-3.1, -3.1, -3.2, -3.2, -3.3],
    [-1.0, -1.05, -1.1, -1.2, -1.2],
    [-5.2, -5.3, -5.3, -5.5, -5.6],
]
NAMES = ("chosen", *(f"chosen@step_{place}" for place in range(1, 5)))


def views():
    columns = zip(NAMES, zip(*POLICY, strict=True), zip(*REFERENCE, strict=True), strict=True)
    ranked = {name: plain(list(policy), list(reference)) for name, policy, reference in columns}
    return {**responses(), **ranked}


def test_values_of_the_list():
    loss = PlackettLuce(beta=0.5, ranked=NAMES)(views()).loss
    assert loss.tolist() == pytest.approx([4.358377936335, 4.638726753357, 4.643802481502])
    loss = PlackettLuce(beta=0.1, ranked=NAMES)(views()).loss
    assert loss.mean().item() == pytest.approx(4.737893047482, abs=1e-11)


@pytest.mark.parametrize(
    ("beta", "each", "mean"),
    [
        (0.5, [5.386810164984, 6.155325270752, 5.650066679900], 5.730734038545),
        (0.1, None, 6.078762023225),
    ],
)
def test_values_of_the_whole_loss(beta, each, mean):
    objective = WeightedSum(
        terms=(
            Term(objective=DPO(beta=beta)),
            Term(objective=PlackettLuce(beta=beta, ranked=NAMES)),
            Term(objective=Anchor(beta=beta)),
        )
    )
    loss = objective(views()).loss
    assert each is None or loss.tolist() == pytest.approx(each, abs=1e-11)
    assert loss.mean().item() == pytest.approx(mean, abs=1e-11)


def test_two_views_are_compared_as_by_dpo():
    found = views()
    pair = {"chosen": found[NAMES[0]], "rejected": found[NAMES[1]]}
    loss = PlackettLuce(beta=0.5, ranked=NAMES[:2])(found).loss
    assert loss.tolist() == pytest.approx(DPO(beta=0.5)(pair).loss.tolist())


def test_large_rewards_are_finite_and_gradients_those_of_the_loss():
    assert ranking_loss([numbers([1e4]), numbers([-1e4])]).item() == 0
    assert ranking_loss([numbers([0.0])] * 5).item() == pytest.approx(math.log(120))
    rewards = [numbers([0.3, -0.2]).requires_grad_(), numbers([0.1, 0.4]).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *some: ranking_loss([*some, some[0] / 2]), rewards)


@pytest.mark.parametrize("ranked", [(), ("chosen",), ("chosen", "chosen")])
def test_a_ranking_of_less_than_two_is_refused(ranked):
    with pytest.raises(ValueError, match="two or more different views"):
        PlackettLuce(beta=0.1, ranked=ranked)
