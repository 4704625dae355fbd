from __future__ import annotations

import numpy as np
import pytest

from diffalign.comparison.compare import Comparison, compare_scores
from diffalign.intervals import score_interval


def outcomes(*prompts: str) -> Comparison:
    """Compare made-up models: each prompt is its seeds' outcomes, such as `WWLT`."""
    model = {
        (f"p{i}", seed): {"W": 1.0, "L": -1.0, "T": 0.0}[letter]
        for i, letters in enumerate(prompts)
        for seed, letter in enumerate(letters)
    }
    return compare_scores(dict.fromkeys(model, 0.0), model)


def test_counts_and_rates_worked_by_hand():
    result = outcomes("WWL", "WT", "LTT")
    assert (result.prompts, result.items) == (3, 8)
    assert (result.wins, result.ties, result.losses) == (3, 3, 2)
    assert result.win_rate == pytest.approx(3 / 5)
    assert result.win_rate_ties_half == pytest.approx((3 + 1.5) / 8)
    assert (result.baseline_mean, result.model_mean) == (0.0, pytest.approx(1 / 8))
    assert result.mean_difference == pytest.approx(1 / 8)


def test_interval_of_two_prompts_worked_by_hand():
    # Generated twice out of {WW, WL}: 1, 3/4 (half of the time) or 1/2: a deviation of 1/4 after
    # the correction by n / (n - 1), as of three trials, with one degree of freedom: a quantile of
    # 12.7.
    result = outcomes("WW", "WL")
    quantile = 12.7062
    assert result.win_rate_interval == pytest.approx(score_interval(0.75, 3, quantile), abs=1e-3)
    assert result.win_rate_ties_half_interval == result.win_rate_interval
    half = quantile * 0.5
    assert result.mean_difference_interval == pytest.approx((0.5 - half, 0.5 + half), rel=0.02)


def test_interval_of_single_pairs_is_the_binomial_one():
    # 100 prompts of one pair: the resampled count of wins is binomial(100, 0.6), whose 2.5 % and
    # 97.5 % quantiles are 50 and 69 or 70.
    interval = outcomes(*["W"] * 60, *["L"] * 40).win_rate_interval
    assert interval.low == pytest.approx(0.50, abs=0.011)
    assert interval.high == pytest.approx(0.69, abs=0.011)


def clustered(rng: np.random.Generator, prompts: int, seeds: int) -> dict[tuple[str, int], float]:
    """Prompts that are won almost always or almost never; half of all pairs are won."""
    chances = rng.choice([0.1, 0.9], size=prompts)
    wins = rng.random((prompts, seeds)) < chances[:, None]
    return {(f"p{i}", s): 2.0 * wins[i, s] - 1 for i in range(prompts) for s in range(seeds)}


def test_the_interval_holds_the_true_rate_as_often_as_it_says():
    rng = np.random.default_rng(0)
    trials, held = 300, 0
    for _ in range(trials):
        model = clustered(rng, prompts=40, seeds=5)
        result = compare_scores(dict.fromkeys(model, 0.0), model, resamples=500)
        held += result.win_rate_interval.low <= 0.5 <= result.win_rate_interval.high
    assert 0.90 <= held / trials <= 0.98


def test_treating_the_images_of_a_prompt_as_independent_would_be_too_narrow():
    model = clustered(np.random.default_rng(1), prompts=40, seeds=8)
    scattered = {(f"{prompt} {seed}", 0): score for (prompt, seed), score in model.items()}
    ours, naive = (
        compare_scores(dict.fromkeys(scores, 0.0), scores).win_rate_interval
        for scores in (model, scattered)
    )
    assert ours.high - ours.low > 1.8 * (naive.high - naive.low)


def test_the_same_scores_give_the_same_interval_and_another_seed_almost_the_same():
    model = clustered(np.random.default_rng(2), prompts=30, seeds=3)
    zeros = dict.fromkeys(model, 0.0)
    first, second, other = (compare_scores(zeros, model, seed=seed) for seed in (0, 0, 1))
    assert first == second
    assert other.win_rate_interval != first.win_rate_interval
    assert other.win_rate_interval == pytest.approx(first.win_rate_interval, abs=0.03)


def test_many_prompts_are_resampled_in_parts_of_bounded_size(monkeypatch):
    model = clustered(np.random.default_rng(3), prompts=50, seeds=2)
    zeros = dict.fromkeys(model, 0.0)
    monkeypatch.setattr("diffalign.intervals._CHUNK", 150)
    interval = compare_scores(zeros, model, resamples=2000).win_rate_interval
    monkeypatch.undo()
    assert interval == pytest.approx(
        compare_scores(zeros, model, resamples=2000).win_rate_interval, abs=0.03
    )


def test_swapping_the_sides_mirrors_everything():
    model = clustered(np.random.default_rng(4), prompts=30, seeds=3)
    zeros = dict.fromkeys(model, 0.0)
    there, back = compare_scores(zeros, model), compare_scores(model, zeros)
    assert (there.wins, there.losses) == (back.losses, back.wins)
    assert there.win_rate == pytest.approx(1 - back.win_rate)
    assert there.win_rate_interval.low == pytest.approx(1 - back.win_rate_interval.high)
    assert there.mean_difference == -back.mean_difference


def test_a_tolerance_makes_small_differences_ties():
    before = {("p", seed): 0.0 for seed in range(4)}
    after = {("p", 0): 0.25, ("p", 1): -0.25, ("p", 2): 0.5, ("p", 3): 0.0}
    result = compare_scores(before, after, tie_tolerance=0.25)
    assert (result.wins, result.ties, result.losses) == (1, 3, 0)
    assert result.mean_difference == pytest.approx(0.125)


def test_items_of_one_side_are_listed_and_left_out():
    before = {("a", 0): 0.0, ("a", 1): 9.0, ("b", 0): 0.0}
    after = {("a", 0): 1.0, ("b", 0): -1.0, ("c", 0): 9.0}
    result = compare_scores(before, after, expected=[("d", 0)])
    assert result.items == 2
    assert (result.baseline_mean, result.model_mean) == (0.0, 0.0)
    assert result.missing_model == (("a", 1), ("d", 0))
    assert result.missing_baseline == (("c", 0), ("d", 0))


def test_ties_everywhere_leave_the_rate_undefined():
    result = outcomes("TT", "T")
    assert result.win_rate is None
    assert result.win_rate_interval is None
    assert result.win_rate_ties_half == 0.5
    assert "undefined" in result.notes[0]


def test_prompts_that_all_differ_alike_tell_no_interval_of_the_difference():
    result = outcomes("WW", "W", "W")
    assert result.mean_difference_interval is None
    assert result.win_rate_interval is not None
    (said,) = [note for note in result.notes if "same difference of scores" in note]
    assert "fewer than 63% of all prompts" in said  # 1 - 0.05^(1/3)


def test_the_p_value_flips_prompts_and_swapping_leaves_it():
    result = outcomes("WW", "WWL", "WT", "LTT", "W", "W", "W")
    back = outcomes("LL", "LLW", "LT", "WTT", "L", "L", "L")
    # Of the 128 flips of 2, 1, 1, -1, 1, 1, 1 there are 14 whose sum is at least 6 off zero.
    assert result.p_value == back.p_value == pytest.approx(14 / 128)
    assert result.needed.trials_per_prompt == back.needed.trials_per_prompt


def test_one_prompt_gives_a_rate_but_no_interval():
    result = outcomes("WWL")
    assert result.win_rate == pytest.approx(2 / 3)
    assert result.win_rate_interval is None
    assert result.win_rate_ties_half_interval is None
    assert result.mean_difference_interval is None
    assert "one prompt only" in result.notes[0]


def test_one_prompt_with_decisions_gives_no_interval_of_the_rate():
    result = outcomes("WL", "T", "T")
    assert result.win_rate_interval is None
    assert result.win_rate_ties_half_interval is not None
    assert "belong to one prompt" in result.notes[0]


def test_a_clean_sweep_has_the_interval_of_as_many_trials_as_prompts():
    result = outcomes(*["WW"] * 30)
    assert result.win_rate_interval == pytest.approx((30 / (30 + 1.959964**2), 1.0), abs=1e-6)
    assert "each of the 30 prompts that decide as one trial" in result.notes[0]


def test_few_prompts_are_said_to_be_few():
    assert "only 5 prompts: intervals are rough" in outcomes("WL", "WL", "W", "W", "L").notes[0]
    assert outcomes(*["W", "L"] * 10).notes == ()


def test_nothing_in_common_is_an_error():
    with pytest.raises(ValueError, match="no prompt and seed has scores of both models"):
        compare_scores({("a", 0): 1.0}, {("b", 0): 1.0})


def test_a_score_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="not finite"):
        compare_scores({("a", 0): 1.0}, {("a", 0): float("nan")})
