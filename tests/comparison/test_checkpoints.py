from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.comparison.checkpoints import (
    Measured,
    as_good_as,
    best_of,
    drift_from,
    render_curve,
    section_of,
    sentences,
    warnings_by_others,
)
from diffalign.comparison.compare import compare_scores
from diffalign.generation.manifest import read_manifest
from tests.jobs.folders import fill


def measured(step: int, wins: int, *, drift: float, ties: int = 0, pairs: int = 40) -> Measured:
    """A checkpoint that wins so many of 40 prompts, and loses those that are not ties."""
    base = {(f"prompt {i}", 0): 0.5 for i in range(pairs)}
    scores = [1.0] * wins + [0.5] * ties + [0.0] * (pairs - wins - ties)
    model = {(f"prompt {i}", 0): score for i, score in enumerate(scores)}
    return Measured(
        step=step,
        checkpoint=Path(f"run/checkpoint-{step}"),
        drift=drift,
        comparison=compare_scores(base, model, resamples=200),
    )


def test_drift_is_the_mean_distance_from_the_images_of_the_same_noise(tmp_path):
    levels = {("base", "a", 0): 0, ("base", "b", 0): 255, ("base", "b", 1): 100}
    # A level is 2 / 255 of the range from -1 to 1; the image without a partner does not count.
    levels |= {("new", "a", 0): 51, ("new", "b", 0): 255, ("new", "c", 0): 7}
    fill(tmp_path, levels)
    found = drift_from(tmp_path, read_manifest(tmp_path), "base")
    assert found == pytest.approx({"new": (51 * 2 / 255 + 0) / 2}, abs=1e-6)


def test_the_best_has_the_highest_win_rate_with_ties_as_half():
    # Early on few pairs are decided, and all of them won: that is no reason to stop there.
    early = measured(10, wins=3, ties=37, drift=0.1)
    later = measured(20, wins=30, drift=0.3)
    assert early.comparison.win_rate == 1.0 and later.comparison.win_rate == 0.75
    assert best_of([early, later]) is later


def test_of_equal_win_rates_the_one_that_drifted_least_is_taken():
    one, other = measured(10, wins=30, drift=0.3), measured(20, wins=30, drift=0.2)
    assert best_of([one, other]) is other


def test_a_scorer_that_did_not_choose_says_where_the_chosen_one_is_worse():
    best = measured(20, wins=35, drift=0.3)
    by_step = {
        10: measured(10, wins=20, drift=0.1).comparison,
        20: measured(20, wins=5, drift=0.3).comparison,
        30: measured(30, wins=2, drift=0.5).comparison,
    }
    (said,) = warnings_by_others(best, {"oracle": by_step}, scorer="jpeg")
    assert said.startswith("Step 20 scores lower than the base by oracle (-0.375), while jpeg")
    assert "Step 10 is the latest that does not." in said
    better = {step: measured(step, wins=25, drift=0.1).comparison for step in by_step}
    assert warnings_by_others(best, {"oracle": better}, scorer="jpeg") == []
    worse = {step: measured(step, wins=5, drift=0.1).comparison for step in by_step}
    (said,) = warnings_by_others(best, {"oracle": worse, "b": better}, scorer="jpeg")
    assert "is the latest" not in said


def test_those_within_the_interval_of_the_best_are_told():
    close, best, far = (
        measured(10, wins=31, drift=0.2),
        measured(20, wins=33, drift=0.3),
        measured(30, wins=8, drift=0.9),
    )
    everyone = [close, best, far]
    assert as_good_as(best, everyone) == [close, best]
    said = sentences(best, everyone)
    assert said[0].startswith("Use the checkpoint of step 20: it wins 82.5% against the base")
    assert said[1] == "These prompts do not tell it from step 10. Of these, step 10 drifted least."
    assert said[2].startswith("The last one, step 30, wins 20.0%: the run went on past its best")


def test_a_best_that_may_be_chance_is_said():
    worse, even = measured(10, wins=12, drift=0.2), measured(20, wins=21, drift=0.3)
    said = " ".join(sentences(even, [worse, even]))
    assert "no checkpoint is better than the base beyond doubt" in said
    assert "past its best" not in said


def test_page_and_curve_show_every_checkpoint():
    everyone = [measured(10, wins=20, drift=0.2), measured(20, wins=30, drift=0.3)]
    curve = render_curve(everyone, everyone[1])
    assert curve.getextrema() != ((255, 255),) * 3
    page = "".join(section_of(everyone, everyone[1], curve, sentences(everyone[1], everyone)).parts)
    assert "step 20 (use this one)" in page and "step 10" in page
    assert "75.0% (" in page and "0.3000" in page


def test_a_curve_without_drift_or_spread_is_rendered():
    same = measured(10, wins=0, ties=40, drift=0.0)
    assert render_curve([same, same], same).width > 100


def test_drift_may_be_measured_by_another_distance(tmp_path):
    fill(tmp_path, {("base", "a", 0): 0, ("new", "a", 0): 51})
    rows = read_manifest(tmp_path)
    assert drift_from(tmp_path, rows, "base", lambda images: len(images) / 8) == {"new": 0.25}
