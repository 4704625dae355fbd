"""Numbers of two sides to probabilities, margins, targets and weights."""

from __future__ import annotations

import math

import pytest

from diffalign.data.skipping import UnusableRowError
from diffalign.data.strength.base import Strength, stack_strengths
from diffalign.data.strength.gap import Gap
from diffalign.data.strength.given import Given
from diffalign.data.strength.settings import StrengthConfig, calibrated
from diffalign.data.strength.votes import Votes, beta_deviation


def labels(chosen: float, rejected: float):
    return {"labels": (chosen, rejected)}


@pytest.mark.parametrize(
    ("votes", "mean", "deviation"),
    [
        ((3, 1), 0.666666666667, 0.178174161275),
        ((30, 0), 0.968750, 0.030288230287),
        ((0, 0), 0.5, 0.288675134595),
    ],
)
def test_votes_under_a_uniform_prior(votes, mean, deviation):
    assert Votes().probability(labels(*votes)) == pytest.approx(mean, abs=1e-12)
    found = beta_deviation(votes[0] + 1, votes[1] + 1)
    assert found == pytest.approx(deviation, abs=1e-12)
    assert Votes().certainty(labels(*votes)) == pytest.approx(0.288675134595 / found)


def test_without_a_prior_the_share_is_read():
    assert Votes(prior=0).probability(labels(3, 1)) == 0.75
    assert Votes(prior=0).probability(labels(30, 0)) == 1.0
    assert Votes(prior=0).probability(labels(0, 0)) == 0.5


def test_shares_are_of_so_many_voters():
    assert Votes(voters=4).probability(labels(0.75, 0.25)) == Votes().probability(labels(3, 1))


def test_a_gap_over_its_temperature():
    assert Gap(temperature=2.0).probability(labels(3.0, 1.0)) == pytest.approx(
        1 / (1 + math.exp(-1))
    )
    assert Gap(temperature=1.0).probability(labels(-1e4, 1e4)) == 0.0
    numbers = {"s": (0.5, 0.0), "sd": (0.3, 0.4)}
    gap = Gap(temperature=1.0, of="s", deviations="sd")
    assert gap.certainty(numbers) == pytest.approx(2.0)


@pytest.mark.parametrize("votes", [(-1, 3), (3, -0.5), (math.inf, 1)])
def test_votes_that_are_no_counts_are_refused(votes):
    with pytest.raises(
        UnusableRowError, match=r"labels are votes, and one of them is .*at least 0"
    ):
        Votes().probability(labels(*votes))


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_a_probability_outside_its_range_is_refused(p):
    strength = StrengthConfig(preference=Given(of="p"), columns={"p": "probability"})
    with pytest.raises(UnusableRowError, match=rf"its preference is {p}.*between 0 and 1"):
        strength.of({"p": (p, 1 - p)})


def test_deviations_that_are_none_are_refused():
    gap = Gap(temperature=1.0, deviations="sd")
    for deviations in ((-1.0, 1.0), (0.0, 0.0)):
        with pytest.raises(UnusableRowError, match=r"sd are standard deviations.*not both 0"):
            gap.certainty({"sd": deviations})


def test_margins_and_targets_are_sums_of_gaps():
    strength = StrengthConfig(
        margin={"aesthetic": 0.5, "labels": -1.0},
        target={"aesthetic": 2.0},
        columns={"aesthetic": "a, b"},
    )
    found = strength.of({"aesthetic": (3.0, 1.0), "labels": (1.0, 0.0)})
    assert found == Strength(margin=0.0, target=4.0)


def test_calibrated_numbers_are_win_rates():
    """Values of the reference; they average one half."""
    found = calibrated([1.0, 0.2, -0.3, 2.0])
    expected = [0.581583628513, 0.358111971658, 0.227609548923, 0.832694850905]
    assert found == pytest.approx(expected, abs=1e-12)
    of_two = StrengthConfig(target={"labels": 1.0}, calibrated=True).of(labels(2.0, 1.0))
    assert of_two.target == pytest.approx(math.tanh(0.5))


def test_pairs_count_by_what_is_known_of_them():
    strength = StrengthConfig(preference=Votes(), weight="certainty")
    few, many = strength.of(labels(3, 1)), strength.of(labels(30, 0), importance=0.5)
    assert few.weight == pytest.approx(0.288675134595 / 0.178174161275)
    assert many.weight == pytest.approx(0.5 * 0.288675134595 / 0.030288230287)


def test_nothing_is_said_that_nobody_asked_for():
    assert StrengthConfig().of({}) == Strength()
    assert stack_strengths([Strength(), Strength()]) == {}
    assert StrengthConfig().is_default and not StrengthConfig(preference=Votes()).is_default


def test_batches_have_the_parts_that_pairs_have():
    found = stack_strengths(
        [Strength(preference=0.75, weight=1.0), Strength(preference=1, weight=2)]
    )
    assert {name: values.tolist() for name, values in found.items()} == {
        "preference": [0.75, 1.0],
        "weight": [1.0, 2.0],
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"weight": "certainty"},
            "weight is certainty, and preference certain does not know its own",
        ),
        (
            {"weight": "certainty", "preference": Gap(temperature=1.0)},
            "preference gap does not know its own: take votes",
        ),
        ({"margin": {"asthetic": 1.0}}, "margin reads asthetic, and there are labels"),
        (
            {"preference": Votes(of="voters"), "columns": {"votes": "a, b"}},
            r"preference reads voters, and there are labels, votes.*Did you mean votes",
        ),
        ({"columns": {"labels": "a, b"}}, "columns.labels is the name of the numbers by which"),
        ({"columns": {"x": " , "}, "margin": {"x": 1.0}}, "columns.x names no column"),
        ({"columns": {"x": "a, b"}}, r"columns\.x is read by nothing: name it under"),
        ({"calibrated": True}, "calibrated is true, and there is no target"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StrengthConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior": -1.0}, "prior must be at least 0, got -1"),
        ({"voters": -1.0}, "voters must be at least 0"),
    ],
)
def test_a_prior_below_zero_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Votes(**settings)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        Gap(temperature=0.0)
