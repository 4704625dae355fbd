"""Rounds of step-wise resampling on a tiny model: what they leave, and what is trained on."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from diffalign import config
from diffalign.errors import ConfigError, DataError
from diffalign.files import read_json_lines
from diffalign.generation.prompts import PromptsConfig
from diffalign.likelihoods.transition import Transition
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.lora import LoraSettings
from diffalign.objectives.base import Likelihoods
from diffalign.objectives.clipped_dpo import ClippedDPO
from diffalign.rollouts.spo import Stepwise
from diffalign.scorers.jpeg import JPEG
from diffalign.training.config import RunConfig
from tests.comparison.brightness import Brightness
from tests.rollouts.noisy_brightness import NoisyBrightness
from tests.rollouts.one_rank import collect
from tests.rollouts.runs import row_metadata
from tests.runs import Killed, files

ROOT = Path(__file__).parents[2]
PROCESS = ReverseProcess(steps=5, guidance=2.0)
PROMPTS = ("a cat", "a dog", "an owl", "a bat", "fog")
SDXL_VARIANT = {"candidates": 2, "steps_per_segment": 2}


@pytest.fixture
def settings(tiny_sd15):
    return SD15(path=str(tiny_sd15), lora=LoraSettings(rank=2))


@pytest.fixture
def model(settings):
    return settings.load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="adapter_off"
    )


def rollouts(**changes):
    given = {
        "prompts": PromptsConfig(texts=PROMPTS),
        "scorer": NoisyBrightness(),
        "prompts_per_round": 3,
        "prompts_per_batch": 2,
        "candidates": 3,
        "first_step": 1,
        "threshold": 0.0,
        "rendered_prompts": 2,
        "previewed_prompts": 1,
    }
    return Stepwise(**(given | changes))


def start(rollouts, settings, model, folder, **changes):
    """The source of a run, bound to its model."""
    usual = {"run_seed": 11, "samples_per_device": 2, "process": PROCESS}
    source = rollouts.open(row_metadata(folder, model=settings, **(usual | changes)))
    source.bind(model)
    return source


def record(folder: Path) -> dict:
    return json.loads((folder / "round-0000/round.json").read_text())["harvest"]


def scores(folder: Path) -> list[dict]:
    return read_json_lines(folder / "round-0000/scores.jsonl")


# --- what a round leaves ------------------------------------------------------------------------


def test_a_round_leaves_scores_images_a_grid_and_the_steps_of_its_pairs(settings, model, tmp_path):
    next(iter(start(rollouts(), settings, model, tmp_path)))
    folder = tmp_path / "round-0000"
    names = {name for name in files(folder) if not name.startswith("images/")}
    assert names == {
        "begun.json",
        "round.json",
        "scores.jsonl",
        "steps.jsonl",
        "grid.png",
        "batches/00000.json",
        "batches/00002.json",
        "latents/00000.safetensors",
        "latents/00002.safetensors",
    }
    assert (tmp_path / "preview_strip.png").exists()
    assert Counter(row["visit"] for row in scores(tmp_path)) == {0: 4, 1: 4, 2: 4}
    assert {row["t"] for row in scores(tmp_path)} == {401, 201, 1, 0}
    steps = read_json_lines(folder / "steps.jsonl")
    assert Counter(step["t"] for step in steps) == {601: 3, 401: 3, 201: 3, 1: 3}


def test_images_are_of_the_best_and_the_worst_at_three_noise_levels(settings, model, tmp_path):
    next(iter(start(rollouts(rendered_prompts=3), settings, model, tmp_path)))
    rows = [row for row in scores(tmp_path) if row["step"] in (1, 3, 4)]
    expected = {
        f"{row['visit']:05d}-t{row['t']:03d}-{row[side]}.png"
        for row in rows
        for side in ("best", "worst")
    }
    assert {path.name for path in (tmp_path / "round-0000/images").iterdir()} == expected
    assert len(expected) == 3 * 3 * 2
    for row in rows:
        name = f"{row['visit']:05d}-t{row['t']:03d}-{row['best']}.png"
        with Image.open(tmp_path / "round-0000/images" / name) as image:
            levels = torch.tensor(list(image.tobytes()), dtype=torch.float64)
        shown = (levels.mean().item() / 127.5 - 1) * (1 - row["t"] / 1000) * 1000
        assert row["scores"][row["best"]] == pytest.approx(shown, abs=0.1)


def test_watched_scorers_see_the_finished_candidates_and_decide_nothing(settings, model, tmp_path):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    next(iter(start(rollouts(), settings, model, plain)))
    watch = (Brightness(scale=2.0), JPEG())
    next(iter(start(rollouts(watch=watch, rendered_prompts=3), settings, model, watched)))
    steps = "round-0000/steps.jsonl"
    assert (watched / steps).read_bytes() == (plain / steps).read_bytes()
    seen = []
    for row in scores(watched):
        assert len(row["watched"]) == (3 if row["t"] == 0 else 0)
        for score, others in zip(row["scores"], row["watched"], strict=False):
            assert others.keys() == {"brightness", "jpeg"}
            # NoisyBrightness of finished images, of values in [-1, 1], in thousandths
            assert others["brightness"] == pytest.approx(score / 1000 + 1, abs=1e-5)
            seen.append(others["brightness"])
    found = record(watched)["summary"]
    assert found["watched/brightness_mean"] == pytest.approx(sum(seen) / len(seen))
    assert found["images"] == 3 and len(seen) == 9
    assert "watched: jpeg" in record(watched)["sentence"]
    assert not any("watched" in name for name in record(plain)["summary"])


def test_watched_scorers_may_change_and_must_see_finished_images(settings, model, tmp_path):
    plain = start(rollouts(), settings, model, tmp_path)
    watched = start(rollouts(watch=(JPEG(),)), settings, model, tmp_path)
    assert plain.fingerprint() == watched.fingerprint()
    with pytest.raises(ValueError, match="scores noisy images at a timestep"):
        rollouts(watch=(NoisyBrightness(),))


def test_no_image_is_no_grid(settings, model, tmp_path):
    next(iter(start(rollouts(rendered_prompts=0), settings, model, tmp_path)))
    assert not (tmp_path / "round-0000/images").exists()
    assert not (tmp_path / "round-0000/grid.png").exists()


def test_best_and_worst_are_those_of_the_scores(settings, model, tmp_path):
    next(iter(start(rollouts(), settings, model, tmp_path)))
    for row in scores(tmp_path):
        assert row["scores"][row["best"]] == max(row["scores"])
        assert row["scores"][row["worst"]] == min(row["scores"])
        assert len(row["scores"]) == 3 and row["valid"]


def test_the_summary_counts(settings, model, tmp_path):
    next(iter(start(rollouts(), settings, model, tmp_path, accumulation=2)))
    summarise_round = record(tmp_path)
    assert summarise_round["micro_batches"] == 6  # of 2 pairs, all 12 of them
    assert summarise_round["summary"]["pairs"] == summarise_round["summary"]["trained_pairs"] == 12
    assert summarise_round["summary"]["valid"] == 1
    finished = [score for row in scores(tmp_path) if row["t"] == 0 for score in row["scores"]]
    assert summarise_round["summary"]["score_mean"] == pytest.approx(sum(finished) / len(finished))
    assert (
        "100% of the comparisons count (100% early, 100% middle, 100% late)"
        in (summarise_round["sentence"])
    )
    assert "12 of 12 pairs of steps fill optimiser steps" in summarise_round["sentence"]


def test_a_plain_scorer_scorers_the_same_predictions(settings, model, tmp_path):
    scorer = Brightness(scale=1000.0)
    next(iter(start(rollouts(scorer=scorer), settings, model, tmp_path)))
    assert all(0 < score < 1000 for row in scores(tmp_path) for score in row["scores"])
    assert record(tmp_path)["micro_batches"] == 6


@pytest.mark.parametrize("continue_from", ["best", "worst"])
def test_the_ablations_go_on_from_an_extreme(settings, model, tmp_path, continue_from):
    next(iter(start(rollouts(continue_from=continue_from), settings, model, tmp_path)))
    assert all(row["continued"] == row[continue_from] for row in scores(tmp_path))


def test_images_are_of_the_size_that_is_asked_for(settings, model, tmp_path):
    batch = next(iter(start(rollouts(size=(16, 24)), settings, model, tmp_path)))
    assert batch.states.shape == (2, 4, 2, 3)
    image = next((tmp_path / "round-0000/images").iterdir())
    assert Image.open(image).size == (24, 16)


def test_the_threshold_decides_which_comparisons_are_trained_on(settings, model, tmp_path):
    next(iter(start(rollouts(), settings, model, tmp_path / "all")))
    differences = sorted(row["difference"] for row in scores(tmp_path / "all"))
    threshold = (differences[5] + differences[6]) / 2
    next(iter(start(rollouts(threshold=threshold), settings, model, tmp_path / "half")))
    rows = scores(tmp_path / "half")
    assert [row["difference"] for row in rows] == [
        r["difference"] for r in scores(tmp_path / "all")
    ]
    kept = {(row["visit"], row["step"]) for row in rows if row["difference"] > threshold}
    assert len(kept) == 6
    steps = read_json_lines(tmp_path / "half/round-0000/steps.jsonl")
    named = (re.fullmatch(r"round-0/(\d+)/step-(\d+)", step["sample_id"]) for step in steps)
    assert {(int(match[1]), int(match[2])) for match in named} == kept
    with safe_open(
        tmp_path / "half/round-0000/latents/00000.safetensors", framework="pt"
    ) as latents:
        rows_kept = latents.get_slice("latents").get_shape()[0]
    named_rows = {
        row
        for step in steps
        if step["file"] == "latents/00000.safetensors"
        for row in (*step["states"].values(), *step["outcomes"].values())
    }
    assert named_rows == set(range(rows_kept))


def test_a_batch_without_a_valid_comparison_writes_no_latents(settings, model, tmp_path):
    hopeless = rollouts(threshold=0.9999999, prompts_per_round=1, previewed_prompts=0)
    source = start(hopeless, settings, model, tmp_path)
    with pytest.raises(DataError, match=r"10 rounds in a row .* 0 of 0 pairs of steps"):
        next(iter(source))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_scores_that_are_not_finite_are_counted_and_not_trained_on(settings, model, tmp_path):
    prompts = PromptsConfig(texts=("a cat", "nan", "fog"))
    source = start(rollouts(prompts=prompts), settings, model, tmp_path)
    next(iter(source))
    assert source.skipped_counts == {"comparisons without finite scores": 4}
    assert record(tmp_path)["summary"]["pairs"] == 8
    assert {step["prompt"] for step in read_json_lines(tmp_path / "round-0000/steps.jsonl")} == {
        "a cat",
        "fog",
    }
    assert (tmp_path / "round-0000/grid.png").exists()


def test_a_round_without_any_finite_score_names_the_scorer(settings, model, tmp_path):
    prompts = PromptsConfig(texts=("nan", "nan too"))
    source = start(rollouts(prompts=prompts), settings, model, tmp_path)
    with pytest.raises(DataError, match=r"round-0000: the scorer noisy_brightness gave none"):
        next(iter(source))


def test_what_only_training_needed_is_released(settings, model, tmp_path):
    source = start(rollouts(), settings, model, tmp_path)
    list(islice(source, 7))
    source.release({"round": 1})
    assert {path.name for path in (tmp_path / "round-0000").iterdir() if path.is_file()} == {
        "begun.json",
        "round.json",
        "scores.jsonl",
        "grid.png",
    }
    assert not list((tmp_path / "round-0000").rglob("*.safetensors"))
    assert list((tmp_path / "round-0001").rglob("*.safetensors"))


# --- what is trained on -------------------------------------------------------------------------


def test_all_steps_of_a_round_are_pooled_shuffled_and_seen_once(settings, model, tmp_path):
    batches = list(islice(start(rollouts(), settings, model, tmp_path), 6))
    ids = [sample_id for batch in batches for sample_id in batch.sample_ids]
    expected = [f"round-0/{visit}/step-{step}" for visit in range(3) for step in range(1, 5)]
    assert sorted(ids) == expected
    assert ids != expected
    assert all(len(batch) == 2 and batch.states.shape == (2, 4, 4, 4) for batch in batches)


def test_rounds_see_other_prompts_in_another_order(settings, model, tmp_path):
    batches = list(islice(start(rollouts(), settings, model, tmp_path), 12))
    orders = [
        [sample_id.partition("/")[2] for batch in part for sample_id in batch.sample_ids]
        for part in (batches[:6], batches[6:])
    ]
    assert orders[0] != orders[1]
    prompts = [{prompt for batch in part for prompt in batch.prompts} for part in
               (batches[:6], batches[6:])]  # fmt: skip
    assert len(prompts[0] | prompts[1]) == 5  # 6 visits in two rounds see all of them


def pair_loss(model, batch, *, through):
    """Loss of a batch under SPO's objective and its gradient; `through` changes the batch."""
    likelihood, batch = Transition(process=PROCESS), through(batch)
    prepared = likelihood.prepare(model, batch)
    with torch.no_grad(), model.reference():
        reference = likelihood.evaluate(model, prepared)
    policy = likelihood.evaluate(model, prepared)
    views = {view: Likelihoods(policy[view], reference[view]) for view in policy}
    model.network.zero_grad()
    loss = ClippedDPO(beta=10.0)(views).loss.mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for _, p in model.trained_parameters()])


def duplicated(batch):
    """A state for every side, as the authors evaluate them."""
    rows = torch.cat([batch.state_rows["chosen"], batch.state_rows["rejected"]])
    return replace(
        batch,
        states=batch.states[rows],
        prompts=tuple(batch.prompts[row] for row in rows.tolist()),
        t=batch.t[rows],
        t_next=batch.t_next[rows],
        state_rows={
            "chosen": torch.arange(len(batch)),
            "rejected": torch.arange(len(batch)) + len(batch),
        },
    )


@pytest.mark.parametrize("variant", [{}, SDXL_VARIANT], ids=["sd15", "sdxl"])
def test_a_shared_state_is_evaluated_once_and_gives_the_loss_and_the_gradient_of_two(
    settings, model, tmp_path, variant
):
    source = start(rollouts(**variant), settings, model, tmp_path, samples_per_device=6)
    batch = next(iter(source))
    first = [int(sample_id[-1]) in (1, 3) for sample_id in batch.sample_ids]
    shared = 6 if variant == {} else sum(first)
    assert shared > 0 and len(batch.states) == 12 - shared
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.05)  # policy and reference differ
    once, gradient = pair_loss(model, batch, through=lambda batch: batch)
    twice, gradient_of_two = pair_loss(model, batch, through=duplicated)
    assert once == pytest.approx(twice, abs=1e-6)
    assert gradient.norm() > 0
    torch.testing.assert_close(gradient, gradient_of_two, rtol=1e-3, atol=1e-5)


def test_at_the_sampling_weights_every_ratio_is_one(settings, model, tmp_path):
    batch = next(iter(start(rollouts(), settings, model, tmp_path)))
    loss, gradient = pair_loss(model, batch, through=lambda batch: batch)
    assert loss == pytest.approx(0.6931472, abs=1e-6)
    assert gradient.norm() > 0


def test_a_gradient_step_raises_the_better_candidate(settings, model, tmp_path):
    batch = next(iter(start(rollouts(), settings, model, tmp_path)))
    before, gradient = pair_loss(model, batch, through=lambda batch: batch)
    step = 1e-3 / gradient.norm()
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.sub_(step * parameter.grad)
    after, _ = pair_loss(model, batch, through=lambda batch: batch)
    assert after < before


# --- killed, resumed, in parallel ---------------------------------------------------------------


def test_a_round_killed_at_any_write_ends_as_an_uninterrupted_one(
    settings, model, tmp_path, monkeypatch
):
    small = rollouts(
        prompts_per_round=2,
        prompts_per_batch=1,
        candidates=2,
        rendered_prompts=1,
        previewed_prompts=0,
    )
    short = {"process": ReverseProcess(steps=3, guidance=1.0)}
    replace_file, writes, last = Path.replace, 0, -1

    def dying(path, target):
        nonlocal writes
        if writes == last:
            raise Killed
        writes += 1
        return replace_file(path, target)

    def first_batch(folder):
        return next(iter(start(small, settings, model, folder, **short))).sample_ids

    monkeypatch.setattr(Path, "replace", dying)
    whole, theirs = first_batch(tmp_path / "whole"), files(tmp_path / "whole")
    total, last = writes, 0
    assert total >= 13  # the round's beginning and end, pairs, scores, images; each batch twice
    while last < total:
        folder = tmp_path / str(last)
        writes = 0
        with pytest.raises(Killed):
            first_batch(folder)
        writes = -total  # this time all of them succeed
        assert first_batch(folder) == whole
        ours = files(folder)
        assert {name for name in ours if not name.endswith(".part")} == set(theirs)
        assert all(ours[name] == theirs[name] for name in theirs)
        last += 1


def test_a_run_goes_on_in_the_middle_of_a_round(settings, model, tmp_path):
    whole = list(islice(start(rollouts(), settings, model, tmp_path), 6))
    source = start(rollouts(), settings, model, tmp_path / "again")
    list(islice(source, 2))
    resumed = start(rollouts(), settings, model, tmp_path / "again")
    resumed.load_state_dict(source.state_dict())
    for ours, theirs in zip(islice(resumed, 4), whole[2:], strict=True):
        assert ours.sample_ids == theirs.sample_ids
        assert torch.equal(ours.states, theirs.states)
        assert all(
            torch.equal(ours.outcomes[view], theirs.outcomes[view]) for view in ours.outcomes
        )


PROGRAM = (
    "import sys\n"
    "from diffalign.training import launch as module\n"
    "popen = module.subprocess.Popen\n"
    "def fake(command, env):\n"
    "    return popen([sys.executable, '-m', 'tests.rollouts.one_rank', *sys.argv[1:]], env=env)\n"
    "module.subprocess.Popen = fake\n"
    "sys.exit(module.launch([], processes=2))\n"
)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_make_the_pairs_of_one_and_train_on_them_in_its_order(
    tiny_sd15, tmp_path, python
):
    result = subprocess.run(
        [python, "-c", PROGRAM, str(tiny_sd15), str(tmp_path / "two")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = collect(str(tiny_sd15), tmp_path / "one")
    torch.set_num_threads(threads)

    one, two = (files(tmp_path / name / "rounds") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    first, second = (
        json.loads((tmp_path / f"two/rank-{rank}.json").read_text()) for rank in (0, 1)
    )
    assert [a + b for a, b in zip(first, second, strict=True)] == alone
    assert len(alone) > 1


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": 1}, "candidates must be at least 2, got 1"),
        ({"first_step": -1}, "first_step must be at least 0, got -1"),
        ({"steps_per_segment": 0}, "steps_per_segment must be at least 1, got 0"),
        ({"prompts_per_round": 0}, "prompts_per_round must be at least 1, got 0"),
        ({"prompts_per_batch": 0}, "prompts_per_batch must be at least 1, got 0"),
        ({"threshold": 1.0}, r"threshold must be at least 0 and below 1, got 1\.0"),
        ({"size": (64,)}, r"size must be \[height, width\] in pixels, .* got \[64\]"),
        ({"size": (64, 60)}, r"multiples of 8, .* got \[64, 60\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        rollouts(**change)


def test_a_first_step_beyond_the_last_is_refused(settings, model, tmp_path):
    with pytest.raises(ConfigError, match=r"first_step is 5, and likelihood\.process\.steps is 5"):
        start(rollouts(first_step=5), settings, model, tmp_path)


def test_another_likelihood_is_refused(settings, model, tmp_path):
    with pytest.raises(ConfigError, match=r"set likelihood\.kind to transition"):
        start(rollouts(), settings, model, tmp_path, process=None)


def test_the_defaults_of_the_method_are_those_of_the_sd15_config():
    written = yaml.safe_load((ROOT / "configs/spo/sd15.yaml").read_text())["rollouts"]
    defaults = {field.name: field.default for field in fields(Stepwise)}
    of_the_method = (
        "candidates",
        "first_step",
        "steps_per_segment",
        "threshold",
        "continue_from",
    )
    assert [defaults[name] for name in of_the_method] == [written[name] for name in of_the_method]


def test_the_faithful_config_differs_in_clipping_alone():
    ours, theirs = (
        config.to_dict(config.load(RunConfig, ROOT / f"configs/spo/{name}.yaml"))
        for name in ("sd15", "sd15_faithful")
    )
    assert (ours["optimizer"].pop("max_grad_norm"), theirs["optimizer"].pop("max_grad_norm")) == (
        1.0,
        None,
    )
    assert ours.pop("output") != theirs.pop("output")
    assert ours == theirs


@pytest.mark.parametrize(("name", "pairs", "prompts"), [("sd15", 40, 40), ("sdxl", 16, 8)])
def test_published_batches_are_reached_with_four_devices(name, pairs, prompts):
    run = config.load(RunConfig, ROOT / f"configs/spo/{name}.yaml")
    assert run.training.samples_per_device * run.training.accumulation * 4 == pairs
    assert run.rollouts.prompts_per_round == run.rollouts.prompts_per_batch * 4 == prompts


def test_a_run_says_what_it_is_about_to_do(settings, model, tmp_path):
    said = rollouts(**SDXL_VARIANT).describe()
    assert (
        "every 2 steps 2 candidates, compared by noisy_brightness, going on from a random" in said
    )
    assert "going on from the best one" in rollouts(continue_from="best").describe()
    lines = start(rollouts(**SDXL_VARIANT), settings, model, tmp_path).describe()
    assert lines == [
        "5 prompts; each visit makes 2 comparisons that label 4 pairs of steps, 12 a round if all "
        "of them count"
    ]


def test_prompts_and_the_scorer_identify_what_is_read(settings, model, tmp_path):
    same = [start(rollouts(), settings, model, tmp_path).fingerprint() for _ in range(2)]
    others = [
        start(rollouts(**change), settings, model, tmp_path).fingerprint()
        for change in (
            {"prompts": PromptsConfig(texts=PROMPTS[:4])},
            {"scorer": NoisyBrightness(scale=2.0)},
        )
    ]
    assert len({*same, *others}) == 3


def test_the_preview_strip_shows_prompts_from_the_whole_list(settings, model, tmp_path):
    source = start(rollouts(previewed_prompts=2), settings, model, tmp_path)
    next(iter(source))
    assert json.loads((tmp_path / "preview_strip/prompts.json").read_text()) == ["a cat", "an owl"]
