"""Several models in one table: differences paired by image, and p-values by exchange."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffalign.benchmarks.report import Measure, Report, panel
from diffalign.benchmarks.several import compare_reports
from diffalign.errors import DataError
from diffalign.evidence import holm, swap_p_value
from diffalign.intervals import Bootstrap, ratio

BOOTSTRAP = Bootstrap(resamples=2000)
MEASURES = {
    "accuracy": Measure("accuracy", "percent", lambda t: 100 * ratio(t["right"], t["questions"])),
    "mean": Measure("mean", "words", lambda t: ratio(t["words"], t["questions"])),
}


def report(right, questions, words, names) -> Report:
    tally = {
        "right": np.asarray(right, float),
        "questions": np.asarray(questions, float),
        "words": np.asarray(words, float),
    }
    whole = panel(tally, MEASURES, BOOTSTRAP, names=names)
    return Report(benchmark="x", whole=whole, bootstrap=BOOTSTRAP)


def rng_reports(seed: int, *, images: int, better: float) -> dict[str, Report]:
    rng = np.random.default_rng(seed)
    hard = rng.random(images)[:, None]  # the same for both models
    names = [str(n) for n in range(images)]
    found = {}
    for name, lift in (("base", 0.0), ("aligned", better)):
        right = (rng.random((images, 6)) < 0.9 - 0.6 * hard + lift).sum(axis=1)
        found[name] = report(right, [6] * images, rng.poisson(9, images), names)
    return found


def test_the_p_value_is_the_share_of_all_exchanges_by_hand():
    first = {"right": np.array([1.0, 0, 2, 1, 0]), "questions": np.array([2.0, 2, 3, 2, 1])}
    other = {"right": np.array([2.0, 2, 3, 1, 1]), "questions": np.array([2.0, 3, 3, 2, 1])}
    statistic = MEASURES["accuracy"].statistic

    def difference(exchanged) -> float:
        sums = [{"right": 0.0, "questions": 0.0} for _ in range(2)]
        for place in range(5):
            for name in sums[0]:
                a, b = first[name][place], other[name][place]
                a, b = (b, a) if exchanged[place] else (a, b)
                sums[0][name] += a
                sums[1][name] += b
        one, two = (statistic({n: np.asarray(v) for n, v in s.items()}) for s in sums)
        return abs(float(two - one))

    all_of_them = [difference(e) for e in itertools.product([0, 1], repeat=5)]
    observed = difference([0] * 5)
    expected = np.mean([d >= observed - 1e-9 for d in all_of_them])
    assert swap_p_value(first, other, statistic) == pytest.approx(expected)
    assert 0 < expected < 1


def test_models_that_are_alike_are_not_told_apart_and_better_ones_are():
    same = {"right": np.arange(9.0), "questions": np.full(9, 9.0)}
    assert swap_p_value(same, same, MEASURES["accuracy"].statistic) == 1
    compared = compare_reports(rng_reports(0, images=80, better=0.15))
    found = compared.differences["aligned"]
    assert found["accuracy"].holm < 0.01 < 0.05 < found["mean"].holm
    interval = found["accuracy"].interval
    assert interval is not None and 0 < interval.low < found["accuracy"].value < interval.high


def test_pairing_by_image_makes_the_interval_of_the_difference_shorter():
    reports = rng_reports(1, images=60, better=0.1)
    alone = [r.whole.figures["accuracy"].interval for r in reports.values()]
    apart = np.hypot(*(i.high - i.low for i in alone if i is not None))
    interval = compare_reports(reports).differences["aligned"]["accuracy"].interval
    assert interval is not None and interval.high - interval.low < 0.8 * apart


def test_p_values_are_corrected_for_all_figures_of_all_models():
    reports = {**rng_reports(2, images=40, better=0.1), **{}}
    third = rng_reports(3, images=40, better=0.05)["aligned"]
    compared = compare_reports({**reports, "third": third})
    found = [d for of_model in compared.differences.values() for d in of_model.values()]
    assert len(found) == 4
    assert [d.holm for d in found] == holm([d.p_value for d in found])


def test_only_images_that_both_have_are_compared_and_others_are_counted():
    one = report([1, 0, 1], [1, 1, 1], [3, 3, 3], ["a", "b", "c"])
    two = report([0, 1, 1], [1, 1, 1], [5, 5, 9], ["c", "b", "d"])
    compared = compare_reports({"one": one, "two": two})
    assert compared.differences["two"]["accuracy"].value == 0  # b and c: 1 of 2 each
    assert compared.differences["two"]["mean"].value == 2
    assert (
        "have 2 images in common; differences are over those, and leave out 2"
        in (compared.notes[0])
    )


def test_models_of_other_images_are_refused():
    one = report([1, 0], [1, 1], [3, 3], ["a", "b"])
    two = report([1, 0], [1, 1], [3, 3], ["c", "d"])
    with pytest.raises(DataError, match=r"none of their images in common \(c, d, and a, b\)"):
        compare_reports({"one": one, "two": two})
