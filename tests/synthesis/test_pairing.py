"""Pairs of judged responses: RLAIF-V's rule."""

from __future__ import annotations

import pytest

from diffalign.synthesis.pairing import length_bound, length_excess, scored_pairs


def test_pairs_need_a_gap_and_the_widest_come_first():
    found = scored_pairs(["a", "b", "c"], [-1.0, 0.0, -3.0], min_gap=1.0)
    assert found == [("b", "c"), ("a", "c"), ("b", "a")]
    assert scored_pairs(["a", "b", "c"], [-1.0, 0.0, -3.0], min_gap=2.5) == [("b", "c")]


def test_equal_scores_make_no_pair_at_any_gap():
    assert scored_pairs(["a", "b"], [1.0, 1.0], min_gap=0.0) == []


def test_excess_is_a_share_of_the_rejected_length():
    assert length_excess("one two", "one two three four") == pytest.approx((4 - 2) / 4)
    assert length_excess("one two three", "one") == pytest.approx((1 - 3) / 1)


def test_the_bound_equalises_mean_lengths():
    pairs = [
        ("a", "a b"),  # excess 1 / 2
        ("a b c d", "a b c"),  # excess -1 / 3
        ("a", "a b c d e f g h i j"),  # excess 9 / 10
    ]
    # with all three the rejected side is 3 words longer on average; without the last, 0
    bound = length_bound(pairs)
    assert bound == 0.88
    assert [length_excess(*pair) <= bound for pair in pairs] == [True, True, False]
