from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings
from diffalign.rollouts.resampling import Resampler, select
from diffalign.rollouts.round_order import Visit
from diffalign.seeding import derive_seed, noise_from_seeds
from tests.rollouts.linear_model import NOISING, LinearModel, slope_of

VISITS = [Visit("a red circle", 1), Visit("two cats", 2), Visit("fog", 3)]
SD15_VARIANT = {"candidates": 4, "first_step": 4, "steps_per_segment": 1}
SDXL_VARIANT = {"candidates": 2, "first_step": 4, "steps_per_segment": 4}
UNEVEN = {"candidates": 3, "first_step": 0, "steps_per_segment": 3}
VARIANTS = pytest.mark.parametrize(
    "variant", [SD15_VARIANT, SDXL_VARIANT, UNEVEN], ids=["sd15", "sdxl", "uneven"]
)


def brightness(images, prompts, t):
    """Another taste at every noise level."""
    tilt = torch.linspace(-1, 1, images[0].numel()) * (1 + t)
    return (images.flatten(1) * tilt).sum(dim=1)


def resampler(steps=20, **changes):
    given = {
        "process": ReverseProcess(steps=steps, guidance=1.0),
        "score_images": brightness,
        "threshold": 0.3,
        "continue_from": "random",
        "size": None,
    }
    return Resampler(**(given | SD15_VARIANT | changes))


def walk(resampler, visits=VISITS, model=None):
    model = model or LinearModel()
    with model.sampling():
        return list(resampler.segments(model, visits))


# --- selection ----------------------------------------------------------------------------------


def test_the_published_selection_is_reproduced():
    scores = [[21.3, 20.9, 21.9, 20.0], [20.1, 20.4, 20.2, 20.3], [19.0, 19.2, 19.1, 19.15]]
    selection = select(torch.tensor(scores, dtype=torch.float64), threshold=0.3)
    assert selection.best.tolist() == [2, 1, 1]
    assert selection.worst.tolist() == [3, 0, 0]
    assert selection.valid.tolist() == [True, False, False]
    assert selection.difference.tolist() == pytest.approx([0.739783, 0.148885, 0.099668], abs=5e-7)


def test_the_difference_is_of_two_softmax_probabilities():
    scores = torch.tensor([[0.3, 2.0, -1.5], [5.0, 5.5, 5.1]])
    selection = select(scores, threshold=0.0)
    extremes = torch.stack([scores.amax(dim=1), scores.amin(dim=1)], dim=1).softmax(dim=1)
    torch.testing.assert_close(selection.difference, extremes[:, 0] - extremes[:, 1])


@pytest.mark.parametrize(("threshold", "gap"), [(0.3, 0.6190), (0.4, 0.8473)])
def test_a_threshold_is_a_gap_between_scores(threshold, gap):
    scores = torch.tensor([[0.0, gap - 1e-3], [0.0, gap + 1e-3]])
    assert select(scores, threshold=threshold).valid.tolist() == [False, True]


def test_of_equal_scores_the_first_is_taken_and_nothing_counts():
    selection = select(torch.tensor([[2.0, 2.0, 2.0], [1.0, 3.0, 3.0]]), threshold=0.0)
    assert selection.best.tolist() == [0, 1]
    assert selection.worst.tolist() == [0, 0]
    assert selection.valid.tolist() == [False, True]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_comparison_with_a_score_that_is_not_finite_does_not_count(value):
    selection = select(torch.tensor([[1.0, value, 9.0], [1.0, 2.0, 9.0]]), threshold=0.0)
    assert selection.valid.tolist() == [False, True]
    assert selection.difference.isnan().tolist() == [True, False]
    assert (selection.best.tolist(), selection.worst.tolist()) == ([2, 2], [0, 0])


# --- the walk -----------------------------------------------------------------------------------


def one_by_one(visit, *, steps, candidates, first_step, steps_per_segment):
    """The algorithm again, for one prompt and one candidate at a time; from random ones."""
    times, slope = NOISING.reverse_times(steps), slope_of(visit.prompt)

    def noise(*parts):
        return noise_from_seeds([derive_seed(visit.seed, *parts)], (3, 2, 2))

    def predicted(state, index):
        return slope * state + times[index][0] / 1000

    def arrive(state, index, candidate):
        t, t_next = (torch.tensor([at]) for at in times[index])
        mean, std = NOISING.transition(state, predicted(state, index), t, t_next, eta=1.0)
        return mean + std * noise(index, candidate)

    state = noise("start")
    for index in range(first_step):
        state = arrive(state, index, 0)
    segments = []
    for first in range(first_step, steps, steps_per_segment):
        end = min(first + steps_per_segment, steps)
        paths = []
        for candidate in range(candidates):
            path = [state]
            for index in range(first, end):
                path.append(arrive(path[-1], index, candidate))
            paths.append(torch.cat(path[1:]))
        arrived = [path[-1:] for path in paths]
        if end == steps:
            t, clean = 0, arrived
        else:
            t = times[end][0]
            at = torch.tensor([t])
            clean = [NOISING.denoised(each, predicted(each, end), at) for each in arrived]
        scores = [brightness(each, [], t).item() for each in clean]
        chosen = derive_seed(visit.seed, "continue", end) % candidates
        segments.append((first, t, state, torch.stack(paths, dim=1), scores, chosen))
        state = arrived[chosen]
    return segments


@VARIANTS
def test_the_walk_is_that_of_one_candidate_at_a_time(variant):
    segments = walk(resampler(**variant))
    for row, visit in enumerate(VISITS):
        expected = one_by_one(visit, steps=20, **variant)
        assert len(segments) == len(expected)
        for ours, (first, t, origin, paths, scores, chosen) in zip(segments, expected, strict=True):
            assert (ours.first, ours.t, int(ours.continued[row])) == (first, t, chosen)
            torch.testing.assert_close(ours.origin[row], origin[0])
            torch.testing.assert_close(ours.paths[:, row], paths)
            assert ours.scores[row].tolist() == pytest.approx(scores, rel=1e-4)


def test_comparisons_and_times_of_the_sd15_variant_are_the_published_ones():
    segments = walk(resampler())
    assert [segment.t for segment in segments] == [*range(701, 0, -50), 0]
    steps = [step for segment in segments for step in segment.times]
    assert steps == [(t, t - 50) for t in range(751, 50, -50)] + [(1, 0)]
    assert len(segments) == len(steps) == 16


def test_comparisons_and_times_of_the_sdxl_variant_are_the_published_ones():
    segments = walk(resampler(**SDXL_VARIANT))
    assert [segment.first for segment in segments] == [4, 8, 12, 16]
    assert [segment.t for segment in segments] == [551, 351, 151, 0]
    assert [len(segment.times) for segment in segments] == [4] * 4
    assert segments[-1].times == ((151, 101), (101, 51), (51, 1), (1, 0))


@pytest.mark.parametrize(
    ("variant", "rows"),
    # 4 steps alone, the first branch, and all candidates at every step but the first four and it.
    [(SD15_VARIANT, 4 + 1 + 15 * 4), (SDXL_VARIANT, 4 + 1 + 15 * 2)],
    ids=["sd15", "sdxl"],
)
def test_going_on_costs_no_evaluation(variant, rows):
    model = LinearModel()
    walk(resampler(**variant), model=model)
    assert model.evaluations == rows * len(VISITS)


def test_the_published_cost_holds_on_a_real_network(tiny_sd15):
    model = SD15(path=str(tiny_sd15)).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
    )
    walk(resampler(process=ReverseProcess(guidance=5.0)), VISITS[:2], model)
    assert model.evaluations == 65 * 2 * 2  # per prompt, for either branch of the guidance


def test_candidates_part_at_the_branch_and_are_scored_at_their_own_noise():
    asked = []

    def listen(images, prompts, t):
        asked.append((list(prompts), t))
        return brightness(images, prompts, t)

    segments = walk(resampler(score_images=listen, **SDXL_VARIANT))
    assert all((segment.paths[:, :, 0] != segment.paths[:, :, 1]).any() for segment in segments)
    each = [visit.prompt for visit in VISITS for _ in range(2)]
    assert asked == [(each, 551), (each, 351), (each, 151), (each, 0)]


def test_what_is_scored_is_the_prediction_and_at_the_end_the_latent_itself():
    segments = walk(resampler())
    for segment in segments[:-1]:
        arrived, t = segment.paths[-1].flatten(0, 1), torch.tensor([segment.t])
        slopes = torch.tensor([slope_of(visit.prompt) for visit in VISITS]).repeat_interleave(4)
        prediction = slopes[:, None, None, None] * arrived + segment.t / 1000
        expected = NOISING.denoised(arrived, prediction, t.expand(12))
        torch.testing.assert_close(segment.images.flatten(0, 1), expected)
    torch.testing.assert_close(segments[-1].images, segments[-1].paths[-1])


@VARIANTS
@pytest.mark.parametrize("continue_from", ["random", "best", "worst"])
def test_the_next_segment_leaves_from_where_the_chosen_candidate_arrived(variant, continue_from):
    segments = walk(resampler(continue_from=continue_from, **variant))
    for before, after in pairwise(segments):
        arrived = before.paths[-1][torch.arange(len(VISITS)), before.continued]
        assert torch.equal(after.origin, arrived)
        if continue_from != "random":
            assert torch.equal(before.continued, getattr(before.selection, continue_from))


def test_a_random_candidate_is_neither_the_best_nor_the_worst_but_any():
    visits = [Visit("fog", seed) for seed in range(50)]
    segments = walk(resampler(steps=8), visits)
    chosen = torch.stack([segment.continued for segment in segments]).flatten()
    best = torch.stack([segment.selection.best for segment in segments]).flatten()
    share = Counter(chosen.tolist())
    assert all(0.15 < share[candidate] / len(chosen) < 0.35 for candidate in range(4))
    assert 0.15 < (chosen == best).float().mean() < 0.35


def test_what_is_generated_for_a_visit_does_not_depend_on_its_company():
    together = walk(resampler())
    alone = walk(resampler(), [VISITS[1]])
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours.paths[:, 1:2], theirs.paths)
        assert ours.continued[1] == theirs.continued[0]


def test_prompts_of_equal_text_and_other_seeds_are_generated_apart():
    segment = walk(resampler(), [Visit("fog", 1), Visit("fog", 2)])[0]
    assert (segment.origin[0] != segment.origin[1]).all()


def test_a_score_that_is_not_a_number_stops_no_sampling():
    def lost(images, prompts, t):
        scores = brightness(images, prompts, t)
        return scores.masked_fill(torch.arange(len(scores)) == 5, math.nan)  # of the second visit

    for continue_from in ("random", "best"):
        segments = walk(resampler(score_images=lost, continue_from=continue_from))
        assert len(segments) == 16
        for segment in segments:
            assert segment.selection.difference.isnan().tolist() == [False, True, False]
            assert not segment.selection.valid[1]
            assert segment.paths.isfinite().all()


def test_the_network_is_told_the_size_that_is_generated():
    model = LinearModel()
    segments = walk(resampler(size=(2, 4)), model=model)
    assert model.told_sizes == {(2, 4)}
    assert segments[0].images.shape == (3, 4, 3, 2, 4)


@pytest.mark.parametrize("kind", ["sd15_v", "sdxl", "sdxl_v"])
def test_real_networks_are_walked_in_the_size_that_is_asked_for(request, kind):
    settings = (SDXL if "sdxl" in kind else SD15)(
        path=str(request.getfixturevalue(f"tiny_{kind}")), lora=LoraSettings(rank=2)
    )
    model = settings.load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="adapter_off"
    )
    process = ReverseProcess(steps=5, guidance=2.0)
    given = {"process": process, "candidates": 2, "first_step": 1, "steps_per_segment": 2}
    segments = walk(resampler(size=(16, 32), **given), VISITS[:2], model)
    assert [segment.images.shape for segment in segments] == [(2, 2, 3, 16, 32)] * 2
    assert all(np.isfinite(segment.paths.numpy()).all() for segment in segments)
