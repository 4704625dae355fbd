"""Rules of pairs, on groups of a few numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffalign import components
from diffalign.errors import DataError
from diffalign.pair_rules.above_gap import AboveGap
from diffalign.pair_rules.base import AbstractPairRule, LabelledPair, ScoredGroup, uniforms
from diffalign.pair_rules.best_random import BestRandom
from diffalign.pair_rules.best_worst import BestWorst
from diffalign.pair_rules.fronts import Fronts
from diffalign.pair_rules.rejection import Rejection, accepted
from diffalign.pair_rules.reliable import Reliable, r_squared

RULES = [
    BestWorst(),
    BestRandom(),
    AboveGap(),
    AboveGap(gap=0.3, most=2),
    Fronts(),
    Rejection(beta=0.5, keep=4),
]


def group(*scores, **by_scorer):
    return ScoredGroup(prompt="a cat", scores=scores, by_scorer=by_scorer or {"one": scores})


def test_every_kind_is_tested_here():
    assert set(components.kinds(AbstractPairRule)) == {
        *map(components.kind_of, RULES),
        "reliable",
    }


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_pair_has_the_better_image_first_and_equal_ones_are_none(rule):
    numbers = np.random.default_rng(0).integers(0, 4, (50, 5))
    made = 0
    for number, row in enumerate(numbers.tolist()):
        some = group(*map(float, row))
        pairs = rule.pairs(some, uniforms(0, number))
        assert all(some.gap(pair) > 0 for pair in pairs)
        assert len(set(pairs)) == len(pairs)
        assert pairs == rule.pairs(some, uniforms(0, number))
        made += len(pairs)
    assert made >= 40
    assert rule.pairs(group(1.0, 1.0, 1.0), uniforms(0)) == []


def test_best_and_worst():
    assert BestWorst().pairs(group(0.1, 0.7, -0.2, 0.3), uniforms()) == [(1, 2)]


def test_the_best_meets_each_other_image_equally_often():
    found = [BestRandom().pairs(group(0.1, 0.7, -0.2, 0.3), uniforms(n))[0] for n in range(3000)]
    for other in (0, 2, 3):
        assert found.count((1, other)) == pytest.approx(1000, abs=4 * math.sqrt(3000 * 2 / 9))


def test_pairs_above_a_gap_begin_with_the_widest():
    some = group(0.0, 1.0, 0.25, 0.75)
    assert AboveGap(gap=0.5).pairs(some, uniforms()) == [(1, 0), (3, 0), (1, 2)]
    assert AboveGap(gap=0.5, most=1).pairs(some, uniforms()) == [(1, 0)]


def test_fronts_of_two_scorers():
    some = group(0.0, 0.0, 0.0, 0.0, one=(3.0, 1.0, 2.0, 0.0), two=(1.0, 3.0, 0.0, 2.0))
    # 0 and 1 are beaten by nothing, 2 and 3 beat nothing; 0 is not above 3, nor 1 above 2.
    assert Fronts().pairs(some, uniforms()) == [(0, 2), (1, 3)]


SCORES = (1.2, 0.4, 0.9, 1.1, -0.3, 0.7, 1.0, 0.2)


@pytest.mark.parametrize(
    ("keep", "seed", "expected", "asked"),
    [(4, 0, "adgc", 10), (8, 0, "adgcfbeh", 16), (4, 1, "acdf", 6)],
)
def test_rejection_sampling_accepts_as_the_authors_listing_does(keep, seed, expected, asked):
    """Values of the listing in appendix A.1 of arXiv:2309.06657, run on these rewards."""
    state, count = np.random.RandomState(seed), []

    def uniform():
        count.append(1)
        return state.uniform()

    found = accepted(SCORES, beta=0.5, keep=keep, uniform=uniform)
    assert "".join("abcdefgh"[place] for place in found) == expected
    assert len(count) == asked


def test_a_pass_accepts_with_the_papers_probability():
    """First-pass probabilities of the same source; the candidate looked at first is asked alone."""
    expected = [1.0, 0.201897, 0.548812, 0.818731, 0.049787, 0.367879, 0.670320, 0.135335]
    for score, probability in zip(SCORES[1:], expected[1:], strict=True):
        for u, taken in ((probability - 1e-5, True), (probability + 1e-5, False)):
            found = accepted((score, 1.2), beta=0.5, keep=1, uniform=lambda u=u: u)
            assert found == ([0] if taken else [1])


def test_rejection_pairs_those_that_follow_each_other():
    state = np.random.RandomState(0)
    pairs = Rejection(beta=0.5, keep=4).pairs(group(*SCORES), state.uniform)
    assert pairs == [(0, 3), (6, 2)]  # a d, g c


def test_r_squared_is_that_of_a_regression_on_both_orders():
    gaps, labels = [0.5, -1.0, 2.0, 0.3], [1.0, 0.0, 1.0, 0.5]
    both = np.array([*gaps, *(-g for g in gaps)]), np.array([*labels, *(1 - y for y in labels)])
    expected = np.corrcoef(*both)[0, 1] ** 2
    assert r_squared(gaps, labels) == pytest.approx(expected, rel=1e-12)
    assert r_squared(gaps, [1 - y for y in labels]) == 0.0
    assert r_squared([0.0], [1.0]) is None


def planted(right_in_the_middle):
    """Groups of four whose score is right about best and worst; about the two in the middle it is
    right or wrong."""
    for number in range(40):
        some = ScoredGroup(prompt=f"prompt {number}", scores=(1.0, 0.6, 0.4, 0.0))
        yield LabelledPair(group=some, places=(0, 3), label=1.0)
        yield LabelledPair(group=some, places=(2, 1), label=0.0 if right_in_the_middle else 1.0)


def test_the_rule_is_chosen_by_what_people_labelled():
    rule = Reliable(rules=(AboveGap(), BestWorst()))
    wrong = rule.fitted(list(planted(False)))
    assert wrong.rule == BestWorst() and wrong.findings["chosen"] == 1
    assert [row["pairs"] for row in wrong.findings["rules"]] == [80, 40]
    # gaps 1 and -0.2, labels 1/2 and 1/2 above one half: (0.5 - 0.1)^2 / ((1 + 0.04) * 0.5)
    assert wrong.findings["rules"][0]["r_squared"] == pytest.approx(0.16 / 0.52)
    assert wrong.findings["rules"][1]["r_squared"] == pytest.approx(1.0)


def test_too_few_labelled_pairs_choose_nothing():
    with pytest.raises(DataError, match="no rule makes more than 10"):
        Reliable().fitted(list(planted(True))[:10])
