"""Heads on features of a few numbers, against values and gradients of their authors' code."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

from diffalign import components
from diffalign.errors import DataError
from diffalign.models.preference.heads.base import AbstractHead, Features
from diffalign.models.preference.heads.cosine import Cosine
from diffalign.models.preference.heads.general import General, general_preference
from diffalign.models.preference.heads.linear import Linear
from diffalign.models.preference.heads.pal import PAL

HEADS = [Cosine(), Linear(), Linear(hidden=3), PAL(users=("ann", "bob")), General(blocks=2)]


def double(rows):
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


def features(n=5, width=6):
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(n, width, generator=generator)
    return Features(joint=joint, plain=torch.randn(n, generator=generator))


def test_every_kind_is_tested_here():
    assert set(components.kinds(AbstractHead)) == set(map(components.kind_of, HEADS))


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_a_head_is_the_same_each_time_and_gives_a_number_a_row(head):
    users = head.rows_of(["bob", "ann", "ann", "bob", "ann"])
    found = [head.build(6)(features(), users) for _ in range(2)]
    assert torch.equal(*found)
    assert found[0].shape == ((5, 4) if head.compares else (5,))
    assert (users is None) == (not head.known_users)


def test_a_linear_head_begins_as_the_encoders_own_score():
    for head in (Linear(), Linear(hidden=3), Cosine()):
        assert torch.equal(head.build(6)(features(), None), features().plain)
    alone = Features(joint=features().joint)
    assert not Linear(hidden=3).build(6)(alone, None).any()


# Values and gradients of `HighDimGeneralPreferenceLoss(tau=0.1, value_head_dim=4)`,
# general_preference/models/loss.py of general-preference/general-preference-model a376d95.
CHOSEN = [[0.3, -0.2, 0.5, 0.1], [-0.4, 0.25, 0.2, -0.6]]
REJECTED = [[0.1, 0.4, -0.3, 0.2], [0.35, 0.05, -0.1, 0.15]]


def test_general_preferences_are_those_of_the_authors():
    chosen, rejected = double(CHOSEN), double(REJECTED)
    margin = general_preference(chosen, rejected, tau=0.1)
    loss = -logsigmoid(margin).mean()
    loss.backward()
    assert loss.item() == pytest.approx(0.8327281066891191, rel=1e-12)
    assert torch.sigmoid(margin).mean().item() == pytest.approx(0.5694199331016911, rel=1e-12)
    assert chosen.grad[1].tolist() == pytest.approx(
        [-0.19954669443490528, 1.3968268610443368, -0.5986400833047157, -0.39909338886981055]
    )
    assert rejected.grad[0].tolist() == pytest.approx(
        [-0.06297335605699649, -0.0944600340854947, 0.03148667802849824, -0.1574333901424912]
    )


def test_general_preferences_can_go_round():
    """Of three at thirds of a circle each is preferred to the next, which no score says."""
    angles = torch.arange(3) * (2 * torch.pi / 3)
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    beats = general_preference(points, points.roll(-1, dims=0), tau=0.1)
    assert (beats > 8).all()
    back = general_preference(points.roll(-1, dims=0), points, tau=0.1)
    assert torch.allclose(back, -beats)
    first, second = General(blocks=1).sides(points, points.roll(-1, dims=0))
    assert torch.allclose(first - second, beats)


# Values and gradients of `PrefLearner_dist_logistic` with `UserLearner_Pw`, src/pal_rm_a of
# RamyaLab/pluralistic-alignment fcfc03c: users a and b, logit_scale 0.3.
PROTOTYPES = [[1.0, 0.0, -0.5], [-0.3, 0.8, 0.2]]
MIXTURES = [[0.4, -1.1], [-0.7, 0.9]]
LEFT, RIGHT = [[0.2, 0.1, -0.4], [0.9, -0.3, 0.6]], [[-0.5, 0.7, 0.3], [0.0, 0.4, -0.2]]
DISTANCES = [0.7632066789236427, 2.070946619255292, 1.9856664786620142, 0.5348076257801281]


def ideal_points():
    module = PAL(users=("a", "b"), dimensions=3, hidden=0).build(3).double()
    with torch.no_grad():
        module.item[0].weight.copy_(torch.eye(3))
        module.item[0].bias.zero_()
        module.prototypes.copy_(double(PROTOTYPES))
        module.mixtures.copy_(double(MIXTURES))
        module.log_scale.fill_(0.3)
    return module


def test_ideal_points_are_those_of_the_authors():
    module, users = ideal_points(), torch.tensor([0, 1])
    left, right = double(LEFT), double(RIGHT)
    scores = [module(Features(joint=side), users) for side in (left, right)]
    found = torch.stack(scores, dim=1)
    assert (-found).flatten().tolist() == pytest.approx(DISTANCES, rel=1e-9)
    (-logsigmoid(found[:, 0] - found[:, 1])).sum().backward()
    assert module.prototypes.grad.flatten().tolist() == pytest.approx(
        [
            *(-0.044248327780764735, 0.1013577462896504, -0.08112469489733345),
            *(-0.41067637608839225, 0.01046259889798038, -0.9431654658079137),
        ]
    )
    assert module.mixtures.grad.flatten().tolist() == pytest.approx(
        [
            *(-0.020180311960559836, 0.020180311960559832),
            *(0.02396251121493006, -0.02396251121493007),
        ]
    )
    assert module.log_scale.grad.item() == pytest.approx(0.8970126916734951)
    assert left.grad[0].tolist() == pytest.approx(
        [-0.2860418462235147, -0.023347173396266695, -0.014076208035606943]
    )


def test_the_scale_is_bounded():
    module = ideal_points()
    with torch.no_grad():
        module.log_scale.fill_(10.0)
    far = module(Features(joint=double(LEFT)), torch.tensor([0, 1]))
    with torch.no_grad():
        module.log_scale.fill_(0.0)
    near = module(Features(joint=double(LEFT)), torch.tensor([0, 1]))
    assert torch.allclose(far, 100 * near)


def test_an_unknown_user_is_refused_by_name():
    with pytest.raises(DataError, match=r"'bobby', who is none of model\.head\.users \(ann, bob\)"):
        PAL(users=("ann", "bob")).rows_of(["ann", "bobby"])
    with pytest.raises(ValueError, match="names everybody once"):
        PAL(users=("ann", "ann"))
