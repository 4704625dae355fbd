"""Reliability curves and the calibration error, on pairs counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffalign.calibration import agreement, reliability


def odds(p):
    return math.log(p / (1 - p))


def test_bins_are_filled_by_the_likelier_side():
    # Said 0.92 for the first, 0.92 for the second (which lost), 0.75 twice (one tie), and nothing.
    curve = reliability([odds(0.92), odds(0.08), odds(0.75), odds(0.75), 0.0], [1, 1, 1, 0.5, 1])
    assert [(b.pairs, b.came_true) for b in curve.bins] == [(1, 0.5), (2, 0.75), (2, 0.5)]
    assert [b.said for b in curve.bins] == pytest.approx([0.5, 0.75, 0.92])
    assert curve.error == pytest.approx((1 * 0 + 2 * 0 + 2 * 0.42) / 5)
    assert (curve.bins[1].low, curve.bins[1].high) == pytest.approx((0.7, 0.75))


def test_the_error_is_that_of_a_computation_apart():
    """Against the definition, bin by bin, on numbers that nobody chose."""
    random = np.random.default_rng(0)
    margins = random.normal(0, 2, 500)
    labels = (random.random(500) < 1 / (1 + np.exp(-0.5 * margins))).astype(float)
    confidence = np.maximum(1 / (1 + np.exp(-margins)), 1 / (1 + np.exp(margins)))
    right = np.where(margins > 0, labels, 1 - labels)
    expected = 0.0
    for n in range(10):
        inside = (confidence > 0.5 + n / 20) & (confidence <= 0.55 + n / 20)
        expected += abs(right[inside].sum() - confidence[inside].sum()) / 500
    found = reliability(margins.tolist(), labels.tolist()).error
    assert found == pytest.approx(expected, rel=1e-12)
    assert found > 0.05, "margins twice too large are overconfident"
    assert reliability((0.5 * margins).tolist(), labels.tolist()).error < found


def test_turning_pairs_round_changes_nothing():
    margins, labels = [0.3, -1.2, 2.0], [1.0, 0.3, 0.0]
    turned = reliability([-m for m in margins], [1 - y for y in labels])
    assert turned == reliability(margins, labels)


def test_agreement_counts_decided_pairs():
    found = agreement([1.0, -1.0, 0.0, 5.0], [1.0, 1.0, 0.0, 0.5], ["a", "b", "c", "d"])
    assert found is not None and found.curve.pairs == 3
    assert found.accuracy == pytest.approx((1 + 0 + 0.5) / 3)
    assert found.interval is not None and found.interval.low < 0.5 < found.interval.high
    assert agreement([1.0], [0.5], ["a"]) is None
