"""P-values, planning and repeated looks, against values that somebody else computed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from diffalign.evidence import (
    holm,
    looks_at,
    prompts_needed,
    sign_flip_p_value,
    trials_needed,
)


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [  # by statsmodels.stats.multitest.multipletests, method holm
        ((0.012, 0.034, 0.0009, 0.21, 0.041), (0.048, 0.102, 0.0045, 0.21, 0.102)),
        ((0.04, 0.04, 0.5, 0.6, 0.001), (0.16, 0.16, 1, 1, 0.005)),
    ],
)
def test_holm_gives_the_values_of_statsmodels(p_values, adjusted):
    assert holm(p_values) == pytest.approx(adjusted)


def test_single_pairs_give_the_sign_test():
    net = array(*[1] * 10, *[-1] * 2, *[0] * 30)  # ties say nothing
    assert sign_flip_p_value(net) == pytest.approx(binomtest(10, 12).pvalue)


def test_few_prompts_are_flipped_in_every_way():
    net = array(3, 1, 2, -1, 4)
    totals = [abs(np.dot(signs, net)) for signs in itertools.product((1, -1), repeat=5)]
    assert sign_flip_p_value(net) == pytest.approx(np.mean(np.array(totals) >= 9))


def test_five_prompts_never_show_a_difference():
    assert sign_flip_p_value(array(9, 9, 9, 9, 9)) == 2 / 32
    assert sign_flip_p_value(array(0, 0)) == sign_flip_p_value(array(5, 0)) == 1


def test_what_is_flipped_is_a_whole_prompt():
    alike = np.repeat([4.0, -4.0], [18, 12])
    apart = np.repeat([1.0, -1.0], [72, 48])
    assert sign_flip_p_value(alike) == pytest.approx(binomtest(18, 30).pvalue, abs=0.02)
    assert sign_flip_p_value(apart) == pytest.approx(binomtest(72, 120).pvalue, abs=0.01)


@pytest.mark.parametrize(("rate", "trials"), [(0.55, 782.53), (0.45, 782.53), (0.6, 193.8)])
def test_independent_trials_take_as_many_as_the_normal_approximation_says(rate, trials):
    assert trials_needed(rate) == pytest.approx(trials, rel=1e-3)


def test_one_pair_a_prompt_takes_as_many_prompts_as_trials():
    wins = np.repeat([1.0, 0.0], [60, 40])
    needed = prompts_needed(wins, 1 - wins, rate=0.55)
    assert (needed.prompts, needed.between, needed.trials_per_prompt) == (783, (783, 783), 1.0)
    half_tied = prompts_needed(np.append(wins, np.zeros(100)), np.append(1 - wins, np.zeros(100)))
    assert half_tied.prompts == 1566


def test_images_that_are_all_alike_add_nothing_and_independent_ones_all():
    alike = np.repeat([4.0, 0.0], [60, 40])
    assert prompts_needed(alike, 4 - alike).prompts == 783
    apart = np.random.default_rng(0).binomial(4, 0.55, 400).astype(float)
    assert prompts_needed(apart, 4 - apart).prompts == pytest.approx(783 / 4, rel=0.15)
    low, high = prompts_needed(apart[:20], 4 - apart[:20]).between
    assert low <= 783 / 4 + 1 < high


@pytest.mark.parametrize(("alike", "images", "ties"), [(0.0, 1, 0.2), (0.3, 4, 0.3)])
def test_so_many_prompts_show_the_rate_in_four_of_five_comparisons(alike, images, ties):
    """A small copy of scripts/comparison_coverage.py power: three standard errors of 600."""
    rng = np.random.default_rng(0)

    def net(prompts: int) -> tuple[np.ndarray, np.ndarray]:
        weight = (1 - alike) / alike if alike else 1e9
        chance = rng.beta(0.6 * weight, 0.4 * weight, prompts)
        decided = rng.binomial(images, 1 - ties, prompts)
        wins = rng.binomial(decided, chance).astype(float)
        return wins, decided - wins

    needed = prompts_needed(*net(20_000), rate=0.6).prompts
    shown = 0
    for _ in range(600):
        wins, losses = net(needed)
        deviation = np.sqrt(((wins - losses) ** 2).sum())
        shown += abs((wins - losses).sum()) > 1.959964 * deviation
    assert shown / 600 == pytest.approx(0.8, abs=3 * np.sqrt(0.8 * 0.2 / 600))


def test_a_sweep_counts_each_prompt_once_and_one_prompt_tells_nothing():
    swept = np.full(10, 3.0)
    assert prompts_needed(swept, 0 * swept).trials_per_prompt == 1
    assert prompts_needed(array(3, 0), array(1, 0)) is None


@pytest.mark.parametrize(
    ("looks", "level", "constant"),
    [  # Armitage, McPherson and Rowe 1969, table 2; Pocock 1977, table 1
        (2, 0.083, 0.0294),
        (3, 0.107, 0.0221),
        (5, 0.142, 0.0158),
        (10, 0.193, 0.0106),
    ],
)
def test_equally_spaced_looks_have_the_published_levels(looks, level, constant):
    found = looks_at([100 * (i + 1) for i in range(looks)])
    assert 1 - found.held == pytest.approx(level, abs=6e-4)
    assert 1 - found.needed == pytest.approx(constant, abs=3e-4)


def test_a_first_look_is_as_it_says_and_one_at_nearly_the_same_data_hardly_less():
    assert looks_at([40]) is None
    assert looks_at([400, 401]).held == pytest.approx(0.95, abs=0.01)
    assert "before, with 40, 80 pairs" in looks_at([40, 80, 120]).in_words
