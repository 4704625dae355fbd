"""Advantages against the numbers of TRL's own code, and what follows from their definition."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from diffalign.objectives.advantages import (
    advantages_of_several,
    differing,
    group_advantages,
    leave_one_out,
    weighted_sum,
)

NAN = float("nan")
REWARDS = ((1.0, 0.2, 0.5), (0.0, 2.0, 1.0))
SECOND = ((0.0, 1.0, 0.5), (1.0, 0.0, 0.3))
DIVERGENCE = ((0.0, 0.25, 0.15), (0.4, -0.2, 0.45))
"""Sum over tokens of the sampling policy's log-probability less the reference's."""


def of(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def flat(advantages):
    return advantages.flatten().tolist()


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (
            "group",
            [1.071956688003, -0.907040274464, -0.164916413539, -0.999900009999, 0.999900009999, 0],
        ),
        (
            "batch",
            [0.599881444599, -0.507591991584, -0.092289453015, -1.384341795228, 1.384341795228, 0],
        ),
        ("none", [0.433333333333, -0.366666666667, -0.066666666667, -1, 1, 0]),
    ],
)
def test_advantages_of_groups(scale, expected):
    assert flat(group_advantages(of(*REWARDS), scale=scale)) == pytest.approx(expected, abs=1e-9)


def test_what_could_not_be_scored_is_left_out():
    rewards = of((1.0, NAN, 0.5), REWARDS[1])
    assert flat(group_advantages(rewards))[:3] == pytest.approx(
        [0.706906837739, 0, -0.706906837739], abs=1e-9
    )
    assert flat(leave_one_out(rewards)) == pytest.approx([0.5, 0, -0.5, -1.5, 1.5, 0], abs=1e-9)


@pytest.mark.parametrize("advantages", [group_advantages, leave_one_out])
@pytest.mark.parametrize("row", [(0.3, 0.3, 0.3), (NAN, NAN, NAN), (NAN, 0.7, NAN)])
def test_a_group_without_differences_teaches_nothing(advantages, row):
    assert flat(advantages(of(row))) == pytest.approx([0, 0, 0], abs=1e-12)


@pytest.mark.parametrize(
    "advantages",
    [
        *(partial(group_advantages, scale=scale) for scale in ("group", "batch", "none")),
        *(partial(leave_one_out, normalize=normalize) for normalize in (False, True)),
        *(
            lambda rewards, way=way: advantages_of_several(
                torch.stack([rewards, 3 * rewards]), (1.0, 0.7), combine=way
            )
            for way in ("sum_then_normalize", "normalize_then_sum")
        ),
    ],
)
@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 0.7, -0.6, 1e5 / 7])
def test_equal_rewards_are_equal_whatever_their_mean_rounds_to(advantages, value):
    """The mean of 0.1, 0.1 and 0.1 is not 0.1."""
    rewards = of((value,) * 3, REWARDS[0], (value, NAN, value))
    assert differing(rewards).tolist() == [False, True, False]
    found = advantages(rewards)
    assert not found[[0, 2]].any() and found[1].all()


def test_a_small_difference_is_one():
    rewards = of((1e-9, 2e-9, 0), (1, 1.0001, 1), (NAN, 1, 1), (NAN, NAN, NAN))
    assert differing(rewards).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        (
            "sum_then_normalize",
            [
                *(1.139937628050, -0.725414854214, -0.414522773836),
                *(-0.952610161450, 1.041225060190, -0.088614898740),
            ],
        ),
        (
            "normalize_then_sum",
            [
                *(1.235487230849, -0.879312511665, -0.356174719184),
                *(-0.967284737131, 1.247808986228, -0.280524249097),
            ],
        ),
    ],
)
def test_two_rewards(combine, expected):
    rewards = torch.stack([of(*REWARDS), of(*SECOND)])
    found = advantages_of_several(rewards, (1.0, 0.5), combine=combine)
    assert flat(found) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_a_response_that_lacks_one_of_two_rewards_counts_nothing(combine):
    rewards = torch.stack([of(*REWARDS), of((NAN, 1.0, 0.5), SECOND[1])])
    found = advantages_of_several(rewards, (1.0, 0.5), combine=combine)
    assert found[0, 0] == 0 and (found[0, 1:] != 0).all()
    assert weighted_sum(rewards, (1.0, 0.5)).isnan().sum() == 1


@pytest.mark.parametrize(
    ("beta", "normalize", "expected"),
    [
        (0.0, False, [0.65, -0.55, -0.1, -1.5, 1.5, 0]),
        (0.1, False, [0.67, -0.5675, -0.1025, -1.5275, 1.5625, -0.035]),
        (
            0.1,
            True,
            [
                *(0.635454907466, -0.538239791026, -0.097215116441),
                *(-1.448742345007, 1.481937750621, -0.033195405614),
            ],
        ),
    ],
)
def test_advantages_against_the_others(beta, normalize, expected):
    rewards = of(*REWARDS) - beta * of(*DIVERGENCE)
    assert flat(leave_one_out(rewards, normalize=normalize)) == pytest.approx(expected, abs=1e-9)


def test_clipped_rewards_against_the_others():
    found = leave_one_out(of(*REWARDS).clamp(0, 1))
    assert flat(found) == pytest.approx([0.65, -0.55, -0.1, -1, 0.5, 0.5], abs=1e-9)


def test_rloo_is_the_difference_to_the_mean_in_another_unit():
    rewards = of(*REWARDS)
    assert torch.allclose(leave_one_out(rewards), 1.5 * group_advantages(rewards, scale="none"))
