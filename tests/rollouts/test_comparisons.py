from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from diffalign.rollouts.comparisons import Comparison, PairBuilder, in_words, summarise
from diffalign.rollouts.resampling import Segment, select
from diffalign.rollouts.round_order import Visit
from diffalign.rollouts.store import LATENTS, step_batch, write_tensors

VISITS = (Visit("a red circle", 1), Visit("two cats", 2))
SD15 = (1, [0.0, 3.0, 1.0, -3.0])
SDXL = (4, [-2.0, 2.0])


def latent(visit, taken, candidate):
    """A latent that says where it is from."""
    return torch.tensor([float(visit), float(taken), float(candidate)])[:, None, None]


def walk(steps_per_segment, scores, *, segments=2, first=4, continued=(1, 0), valid=(True, True)):
    """Segments of two visits that go on from given candidates; a visit's scores may be equal."""
    origins = [0, 0]
    for number in range(segments):
        start = first + number * steps_per_segment
        taken = range(start, start + steps_per_segment)
        rows = torch.tensor([scores if counts else [0.0] * len(scores) for counts in valid])
        last = number == segments - 1
        yield Segment(
            first=start,
            times=tuple((951 - 50 * i, 901 - 50 * i) for i in taken),
            t=0 if last else 951 - 50 * (start + steps_per_segment),
            origin=torch.stack([latent(i, start, origins[i]) for i in range(2)]),
            paths=torch.stack(
                [
                    torch.stack(
                        [
                            torch.stack([latent(i, index + 1, c) for c in range(len(scores))])
                            for i in range(2)
                        ]
                    )
                    for index in taken
                ]
            ),
            images=torch.zeros(2, len(scores), 3, 8, 8),
            scores=rows,
            selection=select(rows, threshold=0.3),
            continued=torch.tensor(continued),
        )
        origins = list(continued)


def entered(*arguments, temperature=None, **changes):
    builder = PairBuilder(
        VISITS,
        round_number=3,
        first_visit=10,
        file="latents/00010.safetensors",
        temperature=temperature,
    )
    for segment in walk(*arguments, **changes):
        builder.add(segment)
    return builder


def place_of(builder, row):
    """Visit, steps taken and candidate of a row of the file."""
    return tuple(builder.latents()[row].flatten().int().tolist())


def test_a_temperature_says_how_sure_steps_are():
    assert {pair.preference for pair in entered(*SD15).pairs} == {None}
    builder = entered(*SD15, temperature=1.0)
    differences = {
        (row.visit, row.step): row.difference for row in builder.comparisons if row.valid
    }
    assert builder.pairs
    for pair in builder.pairs:
        visit, step = pair.sample_id.split("/")[1:]
        difference = differences[int(visit), int(step.removeprefix("step-"))]
        assert pair.preference == pytest.approx((1 + difference) / 2)


def test_the_sides_of_a_single_step_share_their_state():
    builder = entered(*SD15)
    assert len(builder.pairs) == 4
    for pair in builder.pairs:
        assert pair.states["chosen"] == pair.states["rejected"]
        assert pair.outcomes["chosen"] != pair.outcomes["rejected"]


def test_every_pair_names_its_step_its_sides_and_where_they_left_from():
    builder = entered(*SD15)
    found = []
    for pair in builder.pairs:
        rows = [
            row[view] for row in (pair.states, pair.outcomes) for view in ("chosen", "rejected")
        ]
        places = [place_of(builder, row) for row in rows]
        found.append((pair.sample_id, pair.prompt, pair.t, pair.t_next, *places))
    assert found == [
        ("round-3/10/step-4", "a red circle", 751, 701, *2 * [(0, 4, 0)], (0, 5, 1), (0, 5, 3)),
        ("round-3/11/step-4", "two cats", 751, 701, *2 * [(1, 4, 0)], (1, 5, 1), (1, 5, 3)),
        ("round-3/10/step-5", "a red circle", 701, 651, *2 * [(0, 5, 1)], (0, 6, 1), (0, 6, 3)),
        ("round-3/11/step-5", "two cats", 701, 651, *2 * [(1, 5, 0)], (1, 6, 1), (1, 6, 3)),
    ]


def test_in_a_longer_segment_only_the_first_step_shares_its_state():
    builder = entered(*SDXL)
    of_first_visit = [pair for pair in builder.pairs if pair.prompt == "a red circle"]
    indices = [int(pair.sample_id.rpartition("-")[2]) for pair in of_first_visit]
    assert indices == list(range(4, 12))
    shared = [pair.states["chosen"] == pair.states["rejected"] for pair in of_first_visit]
    assert shared == [True, False, False, False] * 2
    for before, after in pairwise(of_first_visit):
        if after.states["chosen"] != after.states["rejected"]:
            assert after.states == before.outcomes
    for pair in builder.pairs:
        for view, candidate in (("chosen", 1), ("rejected", 0)):
            assert place_of(builder, pair.outcomes[view])[2] == candidate


def test_no_latent_is_in_the_file_twice_and_none_that_no_pair_needs():
    # 2 visits x (start, 2 of the first segment, 2 of the second); the second visit goes on from a
    # candidate that is neither best nor worst, which is one more.
    builder = entered(*SD15)
    rows = [tuple(latent.flatten().tolist()) for latent in builder.latents()]
    assert len(rows) == len(set(rows)) == 11
    named = {
        row for pair in builder.pairs for row in (*pair.states.values(), *pair.outcomes.values())
    }
    assert named == set(range(11))


def test_a_comparison_that_does_not_count_labels_nothing_but_is_told():
    builder = entered(*SDXL, valid=(True, False))
    assert {pair.prompt for pair in builder.pairs} == {"a red circle"}
    assert [(row.visit, row.valid) for row in builder.comparisons] == [(10, True), (11, False)] * 2
    assert {place_of(builder, row)[0] for row in range(len(builder.latents()))} == {0}


def test_a_comparison_tells_everything_about_itself():
    first = entered(*SD15).comparisons[0]
    assert first == Comparison(
        visit=10,
        prompt="a red circle",
        step=4,
        t=701,
        scores=[0.0, 3.0, 1.0, -3.0],
        best=1,
        worst=3,
        difference=pytest.approx(math.tanh(3.0)),
        valid=True,
        continued=1,
    )


def test_scores_that_are_not_finite_are_none():
    row = entered(1, [0.0, math.nan, 1.0]).comparisons[0]
    assert (row.scores, row.difference, row.valid) == ([0.0, None, 1.0], None, False)


def test_a_batch_of_pairs_reads_the_latents_back(tmp_path):
    builder = entered(*SDXL)
    write_tensors(tmp_path / builder.file, {LATENTS: builder.latents()})
    batch = step_batch(tmp_path, builder.pairs[:3])
    assert batch.t.tolist() == [751, 701, 701, 651, 651]
    assert batch.state_rows["chosen"].tolist() == [0, 1, 3]
    assert batch.state_rows["rejected"].tolist() == [0, 2, 4]
    assert batch.states.flatten(1).tolist() == [
        [0, 4, 0], [0, 5, 1], [0, 5, 0], [0, 6, 1], [0, 6, 0],
    ]  # fmt: skip
    assert batch.outcomes["chosen"].flatten(1).tolist() == [[0, 5, 1], [0, 6, 1], [0, 7, 1]]
    assert batch.outcomes["rejected"].flatten(1).tolist() == [[0, 5, 0], [0, 6, 0], [0, 7, 0]]


def comparison(step, *, t=1, scores=(0.0, 2.0), valid=True):
    return Comparison(
        visit=0,
        prompt="fog",
        step=step,
        t=t,
        scores=list(scores),
        best=1,
        worst=0,
        difference=0.7,
        valid=valid,
        continued=0,
    )


def test_figures_of_a_round():
    rows = [comparison(step, valid=step in (4, 5, 9)) for step in range(4, 10)]
    rows += [comparison(10, t=0, scores=(1.0, 4.0, None), valid=False)]
    figures = summarise(rows)
    assert figures["valid"] == pytest.approx(3 / 7)
    # Branches 4 to 10 in thirds: 4 5 6, 7 8, 9 10.
    assert figures["valid_early"] == pytest.approx(2 / 3)
    assert figures["valid_middle"] == 0
    assert figures["valid_late"] == pytest.approx(1 / 2)
    assert (figures["score_mean"], figures["score_std"]) == (2.5, 1.5)
    assert figures["candidate_score_mean"] == pytest.approx((6 * 2 + 5) / 14)


def test_figures_of_a_round_with_one_comparison_a_visit():
    figures = summarise([comparison(0, t=0)])
    assert {name for name in figures if name.startswith("valid")} == {"valid", "valid_early"}
    assert (
        in_words(figures)
        == "score 1 \N{PLUS-MINUS SIGN} 1; 100% of the comparisons count (100% early)"
    )


def test_a_round_without_a_finished_score_has_words_too():
    figures = summarise([comparison(0), comparison(1, t=0, scores=(None, None), valid=False)])
    assert in_words(figures).startswith("no finished candidate has a finite score; 50% of")
