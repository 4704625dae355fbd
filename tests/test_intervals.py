"""Intervals over clusters: scipy's own values, coverage, and what a few clusters cannot promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import skew, t

from diffalign.benchmarks.report import Measure, panel
from diffalign.intervals import (
    Bootstrap,
    agreement_tally,
    contributions_of,
    degrees_of_freedom,
    exact_interval,
    krippendorff_alpha,
    majority_excess,
    percentile_interval,
    ratio,
    score_interval,
    skewed_interval,
)

RATE = {"rate": lambda counts: ratio(counts["hits"], counts["trials"])}
SHARE = {"rate": 1.0}
TWELVE = {
    "hits": np.array([4, 1, 3, 3, 1, 3, 4, 4, 2, 1, 0, 1.0]),
    "trials": np.array([6, 2, 5, 5, 5, 3, 5, 4, 6, 2, 2, 6.0]),
}


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [  # scipy.stats.bootstrap called by somebody else, with default_rng(7)
        ("percentile", 0.365384615385, 0.688908045977),
        ("bca", 0.366711869208, 0.690433565020),
    ],
)
def test_the_methods_of_scipy_give_its_values(method, low, high):
    bootstrap = Bootstrap(seed=7, resamples=2000, method=method)
    assert bootstrap.intervals(TWELVE, RATE)["rate"] == pytest.approx((low, high), abs=1e-11)


def test_the_spread_is_that_of_the_bootstrap():
    # 0.0834440119 is scipy's standard error of the same resamples
    low, high = Bootstrap(seed=7, resamples=2000).intervals(TWELVE, RATE)["rate"]
    contributions = contributions_of(TWELVE, RATE["rate"])
    quantile = t.ppf(0.975, degrees_of_freedom(contributions, 12))
    spread, skewness = 0.083444011945 * np.sqrt(12 / 11), skew(contributions) / np.sqrt(12)

    def transformed(end):
        deviation = (27 / 51 - end) / spread
        cubed = skewness**2 * deviation**3 / 27
        return deviation + skewness * deviation**2 / 3 + cubed + skewness / 6

    assert (transformed(low), transformed(high)) == pytest.approx((quantile, -quantile), abs=1e-8)


def test_without_skewness_the_interval_is_students():
    assert skewed_interval(1.0, 0.5, 2.0, 0.0) == (0.0, 2.0)
    assert skewed_interval(1.0, 0.5, 2.0, 1e-5) == pytest.approx((0.0, 2.0), abs=1e-4)


def test_an_interval_is_longer_on_the_side_of_the_large_values():
    tally = {"hits": np.array([0.0] * 8 + [3.0, 9.0]), "trials": np.ones(10)}
    mirrored = {"hits": -tally["hits"], "trials": np.ones(10)}
    low, high = Bootstrap().intervals(tally, RATE)["rate"]
    assert high - 1.2 > 2 * (1.2 - low)
    assert Bootstrap().intervals(mirrored, RATE)["rate"] == pytest.approx((-high, -low))


def test_values_without_spread_have_no_interval_unless_they_are_a_share():
    tally = {"hits": np.full(9, 0.5), "trials": np.ones(9)}
    assert Bootstrap().intervals(tally, RATE) == {"rate": None}
    assert Bootstrap().intervals(tally, RATE, SHARE)["rate"] is not None


@pytest.mark.parametrize(
    ("share", "trials", "low", "high"),
    [  # Wilson's interval: of 275 wins in 500, and of 10 in 10 (n / (n + z^2))
        (0.55, 500, 0.506177217735, 0.593060348219),
        (1.0, 10, 10 / (10 + 1.959963984540**2), 1.0),
        (0.0, 10, 0.0, 1.959963984540**2 / (10 + 1.959963984540**2)),
    ],
)
def test_the_score_interval_is_wilsons(share, trials, low, high):
    assert score_interval(share, trials, 1.959963984540) == pytest.approx((low, high), abs=1e-11)


def test_a_share_of_independent_trials_gets_nearly_wilsons_interval():
    hits = np.repeat([1.0, 0.0], [220, 180])
    found = Bootstrap().intervals({"hits": hits, "trials": np.ones(400)}, RATE, SHARE)["rate"]
    assert found == pytest.approx(score_interval(0.55, 400, 1.96), abs=2e-3)


def test_what_never_failed_has_the_width_of_its_clusters():
    tally = {"hits": np.full(5, 9.0), "trials": np.full(5, 9.0)}
    low, high = Bootstrap().intervals(tally, RATE, SHARE)["rate"]
    assert (low, high) == pytest.approx((5 / (5 + 1.959963984540**2), 1.0))


def test_percent_are_shares_of_a_hundred():
    percent = {"rate": lambda counts: 100 * ratio(counts["hits"], counts["trials"])}
    of_hundred = Bootstrap().intervals(TWELVE, percent, {"rate": 100.0})["rate"]
    of_one = Bootstrap().intervals(TWELVE, RATE, SHARE)["rate"]
    assert of_hundred == pytest.approx([100 * end for end in of_one])


def test_counts_of_one_cluster_stay_together():
    torn = {"hits": np.repeat([1.0, 0.0], 60), "trials": np.ones(120)}
    kept = {"hits": np.repeat([6.0, 0.0], 10), "trials": np.full(20, 6.0)}
    narrow, wide = (Bootstrap().intervals(tally, RATE, SHARE)["rate"] for tally in (torn, kept))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_a_figure_that_few_clusters_carry_has_few_degrees_of_freedom():
    one, many = np.eye(1, 36)[0], np.random.default_rng(0).normal(size=36)
    assert degrees_of_freedom(one - one.mean(), 36) == pytest.approx(2.0, abs=0.2)
    assert 25 < degrees_of_freedom(many - many.mean(), 36) <= 35


@pytest.mark.parametrize("prompts", [5, 10, 20, 36])
@pytest.mark.parametrize("rate", [0.5, 0.8, 0.97])
def test_the_interval_of_a_share_covers_it(prompts, rate):
    """A small copy of scripts/interval_coverage.py: three standard errors of 300 trials."""
    rng = np.random.default_rng((prompts, int(100 * rate)))
    held = 0
    for _ in range(300):
        of_prompt = rng.beta(9 * rate, 9 * (1 - rate), prompts)
        tally = {"hits": rng.binomial(5, of_prompt) * 1.0, "trials": np.full(prompts, 5.0)}
        low, high = Bootstrap(resamples=300).intervals(tally, RATE, SHARE)["rate"]
        held += low <= rate <= high
    assert held / 300 > 0.93 - 3 * np.sqrt(0.93 * 0.07 / 300)


def test_the_seed_decides():
    tally = {"hits": np.random.default_rng(1).random(30), "trials": np.ones(30)}
    first, second = (Bootstrap(seed=5, resamples=200).intervals(tally, RATE) for _ in range(2))
    assert first == second
    assert Bootstrap(seed=6, resamples=200).intervals(tally, RATE) != first


@pytest.mark.parametrize("method", ["auto", "percentile", "bca"])
def test_one_cluster_has_no_interval(method):
    tally = {"hits": np.ones(1), "trials": np.ones(1)}
    assert Bootstrap(method=method).intervals(tally, RATE, SHARE) == {"rate": None}


@pytest.mark.parametrize("method", ["auto", "percentile", "bca"])
def test_what_is_never_defined_has_no_interval(method):
    tally = {"hits": np.zeros(9), "trials": np.zeros(9)}
    assert Bootstrap(method=method).intervals(tally, RATE, SHARE) == {"rate": None}
    assert percentile_interval(np.full(10, np.nan), 0.95) is None
    assert np.isnan(ratio(np.array(0.0), np.array(0.0)))


def test_few_clusters_are_said_to_be_few():
    assert Bootstrap().cautions(20, "prompts") == []
    assert "only 19 prompts: intervals are rough" in Bootstrap().cautions(19, "prompts")[0]
    (said,) = Bootstrap(method="bca").cautions(19, "images")
    assert "only 19 images" in said and "too narrow; 20 or more" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"confidence": 95}, "above 0 and below 1"), ({"resamples": 10}, "at least 100")],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Bootstrap(**settings)


def test_no_figure_of_a_report_is_said_to_be_below_zero():
    tally = {"hits": np.array([1.0, 9.0, 2.0]), "trials": np.ones(3)}
    words = panel(tally, {"length": Measure("length", "words", RATE["rate"])}, Bootstrap())
    assert Bootstrap().intervals(tally, RATE)["rate"].low < 0
    assert words.figures["length"].interval.low == 0


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # by quantiles of the beta distribution; of none and of all 1 - 0.025^(1/n) and 0.025^(1/n)
        (60, 100, 0.497209, 0.696706),
        (0, 10, 0.0, 1 - 0.025**0.1),
        (10, 10, 0.025**0.1, 1.0),
    ],
)
def test_the_exact_interval_is_that_of_clopper_and_pearson(successes, trials, low, high):
    assert exact_interval(successes, trials) == pytest.approx((low, high), abs=1e-6)


KRIPPENDORFF = [  # labels 1 to 5 of four observers for twelve units; 0 is none
    [1, 1, 0, 1],
    [2, 2, 3, 2],
    [3, 3, 3, 3],
    [3, 3, 3, 3],
    [2, 2, 2, 2],
    [1, 2, 3, 4],
    [4, 4, 4, 4],
    [1, 1, 2, 1],
    [2, 2, 2, 2],
    [0, 5, 5, 5],
    [0, 0, 1, 1],
    [0, 0, 3, 0],
]


def summed(tally):
    return {name: np.asarray(counts.sum()) for name, counts in tally.items()}


def test_alpha_is_that_of_krippendorffs_example():
    # Computing Krippendorff's alpha-reliability (2011), section C: nominal alpha is 0.743.
    labels = np.array(KRIPPENDORFF)
    counts = np.stack([(labels == k).sum(axis=1) for k in range(1, 6)], axis=1).astype(float)
    tally = agreement_tally(counts)
    assert len(tally["disagreements"]) == 11  # the last unit has one label
    assert float(krippendorff_alpha(summed(tally))) == pytest.approx(0.743421, abs=1e-6)


def test_alpha_is_1_of_agreement_and_undefined_of_one_category():
    agreed = agreement_tally(np.array([[2.0, 0.0], [0.0, 2.0]]))
    assert float(krippendorff_alpha(summed(agreed))) == 1
    same = agreement_tally(np.array([[2.0, 0.0], [2.0, 0.0]]))
    assert np.isnan(krippendorff_alpha(summed(same)))


def test_alpha_has_an_interval():
    generator = np.random.default_rng(0)
    first = generator.binomial(4, generator.choice([0.1, 0.9], 200)).astype(float)
    tally = agreement_tally(np.stack([first, 4 - first], axis=1))
    low, high = Bootstrap(resamples=500).intervals(tally, {"alpha": krippendorff_alpha})["alpha"]
    assert 0.4 < low < float(krippendorff_alpha(summed(tally))) < high < 0.8


def test_majorities_of_coins_and_of_people():
    every = np.array([[bin(n).count("1"), 4 - bin(n).count("1")] for n in range(16)], dtype=float)
    assert majority_excess(every) == pytest.approx(0, abs=1e-9)  # every outcome of four coins once
    # Of four coins the larger share is 1/2, 3/4 or 1 in 6, 8 and 2 of 16 cases: 11/16 on average,
    # with a variance of 7/256. Three of four, 16 times, are 16 (12/16 - 11/16) more.
    three = np.tile([3.0, 1.0], (16, 1))
    assert majority_excess(three) == pytest.approx(1 / np.sqrt(16 * 7 / 256))
    assert majority_excess(np.array([[1.0, 0.0]])) == 0
