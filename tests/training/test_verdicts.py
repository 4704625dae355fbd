"""Each rule on rows made by hand, and all of them on the series of runs of the playground."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from diffalign.files import read_json_lines
from diffalign.training.health_record import Record
from diffalign.training.verdicts import Verdict, verdicts_on

SERIES = {
    run["name"]: run for run in read_json_lines(Path(__file__).parent / "health_series.jsonl")
}
"""Written by `python scripts/check_health.py --series`."""


def record_of(
    *rows: Mapping[str, float], measure: Any = "denoising error", clip: float | None = None
) -> Record:
    """Rows of 100 samples each, one every ten steps."""
    record = Record(measure=measure, clip=clip)
    for number, row in enumerate(rows, start=1):
        record = record.after({"step": 10 * number, "samples": 100 * number, "loss": 0.7, **row})
    return record


def named(record: Record) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in verdicts_on(record)}


def denoiser(growth: float, *, far_off: float = 0.0, **more: float) -> dict[str, float]:
    """The chosen error is 0.1 under the reference, and `growth` times that under the policy."""
    drift = -0.5 * (growth - 1) * 0.1
    return {"error/chosen": 0.1 * growth, "drift/chosen": drift, "far_off": far_off, **more}


def test_nothing_is_said_before_there_are_three_intervals_and_256_samples():
    bad = denoiser(5.0, far_off=0.2)
    assert not named(record_of(bad, bad))
    assert named(record_of(bad, bad, bad))
    few = Record(measure="denoising error")
    for number in range(1, 26):
        few = few.after({"step": number, "samples": 10 * number, "loss": 1.0, **bad})
        assert not named(few)
    few = few.after({"step": 26, "samples": 260, "loss": 1.0, **bad})
    assert named(few) and len(few.latest) == 26


def test_only_the_latest_intervals_count():
    bad, good = denoiser(5.0, far_off=0.2), denoiser(1.2)
    assert named(record_of(bad, bad, bad))
    assert not named(record_of(bad, bad, bad, good, good, good))


def test_a_rate_that_is_too_high_shows_in_errors_and_in_pairs_far_off():
    found = named(record_of(*[denoiser(2.5, far_off=0.05)] * 3))
    assert found.keys() == {"rate_too_high"}
    verdict = found["rate_too_high"]
    assert verdict.figures == pytest.approx({"chosen_error_growth": 2.5, "far_off": 0.05})
    assert "2.5 times the reference's, and 5% of the pairs" in verdict.sentence
    assert "Lower optimizer.lr" in verdict.sentence and verdict.lower_rate


def test_errors_that_run_away_without_pairs_far_off_are_displacement():
    rows = [denoiser(2.1, far_off=0.01, cosine_of_sides=0.9)] * 3
    verdict = named(record_of(*rows))["chosen_lost"]
    assert "likelihood.safeguard=0.9 (the two sides' residuals have a cosine of 0.90)" in (
        verdict.sentence
    )
    assert not named(record_of(*[denoiser(1.9, far_off=0.01)] * 3))


def test_pairs_far_off_alone_are_no_harm():
    # At low noise a few pairs are wrong by far where beta is large, in runs that do well.
    assert not named(record_of(*[denoiser(1.3, far_off=0.1)] * 3))


def test_without_a_reference_errors_are_held_against_the_first_intervals():
    rows = [{"error/chosen": error} for error in (0.08, 0.1, 0.12, 0.2, 0.22, 0.24)]
    assert not named(record_of(*rows[:5]))
    assert named(record_of(*rows))["chosen_lost"].figures == pytest.approx(
        {"chosen_error_growth": 2.2}
    )


def responses(chosen: float, rejected: float, **more: float) -> dict[str, float]:
    """Log-ratios of responses of ten tokens."""
    sides = {"drift/chosen": chosen, "drift/rejected": rejected}
    return {**sides, "tokens/chosen": 10, "tokens/rejected": 10, **more}


def test_chosen_responses_that_lose_what_they_gained_are_told():
    rising = [responses(chosen, -1.0) for chosen in (0.2, 0.5, 0.8, 0.8, 0.8)]
    falling = [responses(0.5, -5.0, **{"accuracy/chosen_shorter": 1.0})] * 3
    measure = "token log-probability"
    assert not named(record_of(*rising, measure=measure))
    verdict = named(record_of(*rising, *falling, measure=measure))["chosen_falls"]
    assert verdict.figures == pytest.approx(
        {"chosen_fall": 0.03, "best_at": 50, "rejected_gain": -0.5}
    )
    assert "0.030 nats per token less probable than at step 50" in verdict.sentence
    assert "length" not in verdict.sentence
    slightly = [responses(0.7, -5.0)] * 3
    assert not named(record_of(*rising, *slightly, measure=measure))


def pairs(share: float, **more: float) -> dict[str, float]:
    return {"displaced": share, "fell/chosen": share + 0.05, **more}


def test_pairs_told_apart_at_the_cost_of_the_chosen_response_are_named():
    measure = "token log-probability"
    found = named(record_of(pairs(0.2), pairs(0.3), pairs(0.31), measure=measure))
    assert found.keys() == {"displaced"}
    assert "27% of the pairs are told apart although" in found["displaced"].sentence
    assert not named(record_of(pairs(0.2), pairs(0.24), pairs(0.3), measure=measure))  # 24.7 %


def test_a_model_that_is_no_longer_sure_of_its_words_is_named():
    def row(entropy: float) -> dict[str, float]:
        return {"top_entropy": entropy, "top_mass": 0.97}

    sure, unsure = [row(0.1)] * 3, [row(0.151)] * 3
    verdict = named(record_of(*sure, *unsure))["flattens"]
    assert "1.5 times that of the first intervals, and they hold 97.0%" in verdict.sentence
    assert not named(record_of(*sure, *[row(0.149)] * 3))
    assert not named(record_of(*unsure, *sure))  # surer is no harm by itself


def test_sampled_responses_of_another_length_are_named_and_those_of_a_data_set_are_not():
    def row(tokens: float, **more: float) -> dict[str, float]:
        return {"tokens/chosen": tokens, **more}

    for later in (61.0, 26.0):
        rows = [*[row(40, **{"round/scored": 8.0})] * 3, *[row(later)] * 3]
        verdict = named(record_of(*rows))["length_drifts"]
        assert f"have {later:.0f} tokens where they had 40" in verdict.sentence
        assert not verdict.lower_rate
        assert not named(record_of(*[row(40)] * 3, *[row(later)] * 3))
    assert not named(record_of(*[row(40, **{"round/scored": 8.0})] * 3, *[row(58)] * 3))


def test_length_is_named_where_the_longer_ones_are_not_preferred():
    by_length = {"accuracy/chosen_shorter": 0.98, "accuracy/chosen_longer": 0.4}
    by_length["chosen_longer"] = 0.1
    rows = [responses(0.8, -1.0)] * 3 + [responses(0.1, -5.0, **by_length)] * 3
    verdict = named(record_of(*rows, measure="token log-probability"))["chosen_falls"]
    assert "preferred in 98% of their pairs, longer ones in 40%" in verdict.sentence
    few = {**by_length, "chosen_longer": 0.05}  # 15 pairs of 300
    rows = [responses(0.8, -1.0)] * 3 + [responses(0.1, -5.0, **few)] * 3
    verdict = named(record_of(*rows, measure="token log-probability"))["chosen_falls"]
    assert "length" not in verdict.sentence


def test_without_a_reference_responses_are_held_against_the_first_intervals():
    def row(chosen: float, rejected: float) -> dict[str, float]:
        return {"log_prob/chosen": chosen, "log_prob/rejected": rejected}

    rows = [*[row(-0.2, -0.2)] * 3, *[row(-0.1, -0.3)] * 3, *[row(-0.15, -0.6)] * 3]
    verdict = named(record_of(*rows, measure="token log-probability"))["chosen_falls"]
    assert verdict.figures["chosen_fall"] == pytest.approx(0.05)


def test_log_ratios_that_stay_beyond_the_clip_range_are_told():
    rows = [{"abs_log_ratio": size} for size in (0.21, 0.3, 0.4)]
    assert named(record_of(*rows, clip=0.1)).keys() == {"beyond_clip"}
    assert not named(record_of(*rows, clip=0.11))
    assert not named(record_of(*rows))  # an objective without a range
    renewed = {"abs_log_ratio": 0.05}  # a new round, whose reference is the policy
    assert not named(record_of(*rows, renewed, *rows[1:], clip=0.1))


def test_a_reward_that_fell_by_half_a_standard_deviation_is_told():
    def sampled(mean: float, scored: float = 400) -> dict[str, float]:
        return {"round/oracle_mean": mean, "round/oracle_std": 0.2, "round/scored": scored}

    rows = [*[sampled(0.8)] * 3, *[sampled(0.9)] * 3, sampled(0.85)]
    assert not named(record_of(*rows))
    verdict = named(record_of(*rows, sampled(0.79)))["reward_fell"]
    assert "by oracle fell from 0.9 in round 1 to 0.79 in round 3" in verdict.sentence
    few = [*[sampled(0.9, 20)] * 3, sampled(0.79, 20)]
    assert not named(record_of(*few))  # within what rounds of 20 images differ by
    unknown = [{n: v for n, v in row.items() if n != "round/scored"} for row in (*rows, few[3])]
    assert not named(record_of(*unknown))


def watched(trained: float, other: float, images: float = 400) -> dict[str, float]:
    """A round with a spread of 2 by jpeg, which is trained on, and of 0.2 by oracle."""
    return {
        "round/jpeg_mean": trained,
        "round/jpeg_std": 2.0,
        "round/watched/oracle_mean": other,
        "round/watched/oracle_std": 0.2,
        "round/images": images,
        "round/scored": images,
    }


def test_a_trained_score_that_rises_at_the_cost_of_a_watched_one_is_told():
    start = [watched(-8.0, 0.8)] * 3
    verdict = named(record_of(*start, watched(-6.0, 0.69)))["reward_hacked"]
    assert (
        "by jpeg, which is trained on, rose from -8 in round 0 to -6 in round 1, and that by "
        "oracle, which is not, fell from 0.8 to 0.69" in verdict.sentence
    )
    assert "raise objective.beta" in verdict.sentence and verdict.lower_rate
    assert verdict.figures["round/watched/oracle_mean"] == 0.69
    for sound in (
        watched(-6.0, 0.71),  # less than half a standard deviation
        watched(-6.0, 0.9),  # both rise
        watched(-7.6, 0.6),  # the trained one hardly rises: 0.2 standard deviations
        watched(-8.5, 0.5),  # both fall, of which reward_fell speaks
        watched(-6.0, 0.69, images=20),  # within what rounds of 20 images differ by
    ):
        assert "reward_hacked" not in named(record_of(*start, sound))
    assert not named(record_of(*start))


def test_rounds_of_other_strategies_are_watched_too():
    def renamed(row: dict[str, float], **names: str) -> dict[str, float]:
        for old, new in names.items():
            row = {n.replace(old, new): v for n, v in row.items() if n != "round/scored"}
        return row

    seppo = [renamed(row, jpeg="jpeg") for row in ([watched(-8.0, 0.8)] * 3)]
    end = renamed(watched(-6.0, 0.69), jpeg="jpeg")
    said = named(record_of(*seppo, end))["reward_hacked"].sentence
    assert "by jpeg rose from -8" in said and "that by oracle fell from 0.8" in said
    spo = [{n.replace("jpeg", "score"): v for n, v in row.items()} for row in map(dict, seppo)]
    spo = [{**row, "round/scored": 4000.0} for row in spo]
    last = {n.replace("jpeg", "score"): v for n, v in watched(-6.0, 0.69).items()}
    said = named(record_of(*spo, last))["reward_hacked"].sentence
    assert "by rollouts.scorer, which is trained on, rose from -8" in said


def test_a_watched_score_that_rose_before_it_falls_is_held_against_its_best_round():
    rows = [*[watched(-8.0, 0.7)] * 3, watched(-7.0, 0.9), watched(-5.0, 0.79)]
    verdict = named(record_of(*rows))["reward_hacked"]
    assert "rose from -7 in round 1 to -5 in round 2" in verdict.sentence
    assert "a checkpoint of round 1" in verdict.sentence


def test_a_watched_score_alone_is_not_what_the_run_is_trained_for():
    rows = [*[watched(-8.0, 0.9)] * 3, watched(-8.0, 0.3)]
    assert not named(record_of(*rows))
    # Watched from the second round on: what there is is compared.
    plain = {n: v for n, v in watched(-9.0, 0.0).items() if "watched" not in n}
    late = [*[plain] * 3, watched(-8.0, 0.9), watched(-6.0, 0.6)]
    assert "in round 1 to -6 in round 2" in named(record_of(*late))["reward_hacked"].sentence


def test_rounds_that_are_all_ties_are_told_and_no_rate_helps():
    verdict = named(record_of(*[{"round/tied_share": 0.95}] * 3))["all_tied"]
    assert "95% of the round's pairs have equal scores" in verdict.sentence
    assert not verdict.lower_rate


def evaluated(*losses: float) -> Record:
    """Held-out losses: before the first step, and after every interval."""
    record = Record(measure="denoising error").after({"step": 0, "held_out/loss": losses[0]})
    for number, loss in enumerate(losses[1:], start=1):
        row = {"step": 10 * number, "samples": 100 * number, "loss": 0.5, "held_out/loss": loss}
        record = record.after(row)
    return record


def test_a_held_out_loss_above_its_start_twice_in_a_row_is_told_with_its_least():
    assert not named(evaluated(0.7, 0.5, 0.6, 0.65, 0.9))
    verdict = named(evaluated(0.7, 0.5, 0.6, 0.8, 0.9))["held_out_worse"]
    assert "is 0.9, above the 0.7 before the first step" in verdict.sentence
    assert "its least was 0.5 at step 10" in verdict.sentence
    assert "it never fell" in named(evaluated(0.7, 0.8, 0.9, 0.8))["held_out_worse"].sentence


def test_a_record_lies_in_a_checkpoint_and_comes_back():
    rows = [responses(0.2, -1.0), {"tokens/chosen": 3.0, "round/a_mean": 0.3}]
    record = record_of(*rows, *[responses(0.5, -2.0)] * 3, measure="token log-probability")
    record = record.after({"step": 60, "held_out/loss": 0.4, "held_out/accuracy": 0.8})
    back = Record.from_tensors(record.as_tensors(), measure=record.measure, clip=None)
    assert back == record
    empty = Record(measure="score")
    assert Record.from_tensors(empty.as_tensors(), measure="score", clip=None) == empty


def test_sound_figures_are_put_into_words():
    said = record_of(*[{"accuracy": 0.9, "drift/chosen": -0.01}] * 3).describe()
    assert said == (
        "nothing harmful was seen, accuracy 90%, chosen side against the reference -0.01"
    )


def first_steps(name: str) -> dict[str, float]:
    """The verdicts on a run, and the step at which each was first reached."""
    figures = SERIES[name]["figures"]
    found: dict[str, float] = {}
    record = Record(measure=SERIES[name]["measure"], clip=SERIES[name]["clip"])
    for number in range(len(figures["step"])):
        row = {key: of[number] for key, of in figures.items() if of[number] is not None}
        record = record.after(row)
        if "loss" in row:
            for verdict in verdicts_on(record):
                found.setdefault(verdict.name, row["step"])
    return found


@pytest.mark.parametrize("name", [name for name, run in SERIES.items() if run["verdict"]])
def test_a_harmful_run_is_named_before_half_of_its_steps(name):
    found = first_steps(name)
    assert found[SERIES[name]["verdict"]] < SERIES[name]["optimizer_steps"] / 2


@pytest.mark.parametrize("name", [name for name, run in SERIES.items() if not run["verdict"]])
def test_a_sound_run_gets_no_verdict(name):
    assert not first_steps(name)
    assert SERIES[name]["figures"]["step"][-1] == SERIES[name]["optimizer_steps"]
