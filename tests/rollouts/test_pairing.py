from __future__ import annotations

import pytest

from diffalign.rollouts.pairing import (
    certainty_weights,
    chosen_pairs,
    from_best_to_worst,
    mean_gap,
    pair_up,
    preference_of,
)


def test_with_one_scorer_the_higher_score_wins_and_equal_ones_tie():
    pairing = pair_up({0: [0.5], 1: [1.0], 2: [0.5]})
    assert pairing.decided == ((1, 0), (1, 2))
    assert (pairing.tied, pairing.incomparable) == (1, 0)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([1.0, 1.0], [0.0, 0.0], "first"),
        ([1.0, 0.5], [0.0, 0.5], "first"),  # as good under one, better under the other
        ([0.5, 0.0], [0.5, 1.0], "second"),
        ([1.0, 0.0], [0.0, 1.0], "incomparable"),
        ([1.0, 2.0], [1.0, 2.0], "tied"),
    ],
)
def test_with_several_scorers_a_side_wins_only_by_dominance(first, second, verdict):
    pairing = pair_up({3: first, 7: second})
    assert pairing.decided == {"first": ((3, 7),), "second": ((7, 3),)}.get(verdict, ())
    assert pairing.tied == (verdict == "tied")
    assert pairing.incomparable == (verdict == "incomparable")


def test_images_rank_by_pairs_won_less_pairs_lost():
    pairing = pair_up({0: [0.1], 1: [0.9], 2: [0.5], 3: [0.5]})
    assert from_best_to_worst(pairing, [0, 1, 2, 3]) == [1, 2, 3, 0]


def test_best_against_worst_is_one_pair_a_prompt():
    pairing = pair_up({0: [0.1], 1: [0.9], 2: [0.5], 3: [0.9]})
    assert len(chosen_pairs(pairing, "all")) == 5
    assert chosen_pairs(pairing, "best_worst") == ((1, 0),)


def test_a_prompt_without_a_decided_pair_gives_none():
    pairing = pair_up({0: [1.0, 0.0], 1: [0.0, 1.0]})
    assert chosen_pairs(pairing, "all") == chosen_pairs(pairing, "best_worst") == ()


def test_the_extremes_are_no_pair_where_they_cannot_be_compared():
    # 0 beats 1 and 2 beats 3, and nothing else can be compared.
    pairing = pair_up({0: [4.0, 1.0], 1: [3.0, 0.0], 2: [2.0, 3.0], 3: [1.0, 2.0]})
    assert pairing.decided == ((0, 1), (2, 3))
    assert from_best_to_worst(pairing, [0, 1, 2, 3]) == [0, 2, 1, 3]
    assert chosen_pairs(pairing, "best_worst") == ()


def test_the_strength_of_a_preference_is_the_mean_gap_of_the_scorers():
    assert mean_gap([2.0, 1.0], [1.0, 0.5]) == pytest.approx(0.75)
    assert preference_of(0.75, 0.75) == pytest.approx(0.731058578630)
    assert preference_of(0.75, None) is None


def test_fronts_leave_out_the_middle():
    # 0 and 1 are beaten by none, 3 beats none; 2 is beaten by 0 and beats 3.
    scores = {0: [3.0, 3.0], 1: [1.0, 4.0], 2: [2.0, 2.0], 3: [1.0, 1.0]}
    pairing = pair_up(scores)
    assert pairing.decided == ((0, 2), (0, 3), (1, 3), (2, 3))
    assert chosen_pairs(pairing, "fronts") == ((0, 3), (1, 3))
    assert chosen_pairs(pair_up({5: [1.0], 7: [1.0]}), "fronts") == ()
    # Images are named by their numbers, whichever of them have scores.
    assert chosen_pairs(pair_up({4: [0.0], 9: [1.0], 6: [0.5]}), "fronts") == ((9, 4),)


def test_a_pair_counts_by_one_over_its_deviation():
    found = certainty_weights([0.1, 0.2, 0.4])
    assert found == pytest.approx([12 / 7, 6 / 7, 3 / 7])  # 10, 5, 2.5 over their mean 35 / 6
    assert certainty_weights([0.0, 0.0]) == [1.0, 1.0]
    assert certainty_weights([]) == []


def test_a_pair_without_deviation_is_not_the_whole_round():
    found = certainty_weights([0.0, 0.1, 0.1])  # at least a tenth of the mean, 1 / 150
    assert found == pytest.approx([150 / (170 / 3), 10 / (170 / 3), 10 / (170 / 3)])
    assert sum(found) == pytest.approx(3)
