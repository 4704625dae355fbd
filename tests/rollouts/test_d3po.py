"""Rounds of whole images on a tiny model: what they leave on disk, and what is trained on."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diffalign import config
from diffalign.errors import ConfigError, DataError
from diffalign.files import read_json_lines
from diffalign.imaging.image_files import pixels_of, read_image
from diffalign.likelihoods.transition import Transition
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.lora import LoraSettings
from diffalign.rollouts import d3po as d3po
from diffalign.rollouts.base import AbstractRollouts
from diffalign.rollouts.d3po import WholeImage
from diffalign.scorers.jpeg import JPEG
from diffalign.scorers.pairwise import Pairwise
from diffalign.scorers.repeats import Perturbation
from tests.comparison.brightness import Brightness
from tests.pair_judges.leaning_judge import LeaningJudge
from tests.rollouts.runs import row_metadata
from tests.runs import Killed, files

PROCESS = ReverseProcess(steps=3, guidance=2.0)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A config with nothing but rollouts."""

    rollouts: AbstractRollouts


@pytest.fixture
def settings(tiny_sd15):
    return SD15(path=str(tiny_sd15), lora=LoraSettings(rank=2))


@pytest.fixture
def model(settings):
    return settings.load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="adapter_off"
    )


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{name}\n" for name in ("a cat", "a dog", "an owl", "a bat", "fog")))
    return path


def rollouts(prompts, **changes):
    given = {
        "prompts": prompts,
        "scorers": (Brightness(),),
        "prompts_per_round": 3,
        "prompts_per_batch": 2,
        "images_per_prompt": 3,
        "previewed_prompts": 1,
    }
    return WholeImage(**(given | changes))


def start(rollouts, settings, model, folder, *, samples_per_device=2, accumulation=3):
    """The source of a run, bound to its model."""
    run = row_metadata(
        folder,
        run_seed=11,
        model=settings,
        samples_per_device=samples_per_device,
        accumulation=accumulation,
        process=PROCESS,
    )
    source = rollouts.open(run)
    if model is not None:
        source.bind(model)
    return source


def record(folder: Path) -> dict:
    return json.loads((folder / "round-0000/round.json").read_text())["harvest"]


def test_a_round_leaves_images_scores_pairs_and_a_grid(prompts, settings, model, tmp_path):
    folder = tmp_path / "rounds/round-0000"
    next(iter(start(rollouts(prompts), settings, model, tmp_path / "rounds")))
    images = read_json_lines(folder / "scores.jsonl")
    assert [(row["visit"], row["image"]) for row in images] == [
        (visit, image) for visit in range(3) for image in range(3)
    ]
    brightness = {}
    for row in images:
        with Image.open(folder / row["file"]) as stored:
            levels = torch.tensor(list(stored.convert("RGB").tobytes()), dtype=torch.float64)
        brightness[row["visit"], row["image"]] = row["scores"]["brightness"]
        assert row["scores"]["brightness"] == pytest.approx(levels.mean().item() / 255, abs=1e-5)
    wins = [
        tuple(map(int, row["pair_id"].rpartition("/")[2].split("-over-")))
        for row in read_json_lines(folder / "pairs.jsonl")
    ]
    visits = [int(row["pair_id"].split("/")[1]) for row in read_json_lines(folder / "pairs.jsonl")]
    assert Counter(visits) == {0: 3, 1: 3, 2: 3}
    for visit, (winner, loser) in zip(visits, wins, strict=True):
        assert brightness[visit, winner] > brightness[visit, loser]
    assert Image.open(folder / "grid.png").width > 3 * 256
    assert (tmp_path / "rounds/preview_strip.png").exists()
    assert sorted(path.name for path in (folder / "latents").iterdir()) == [
        "0000.safetensors",
        "0002.safetensors",
    ]


def test_a_temperature_says_how_sure_pairs_are(prompts, settings, model, tmp_path):
    batch = next(iter(start(rollouts(prompts, temperature=0.01), settings, model, tmp_path)))
    rows = read_json_lines(tmp_path / "round-0000/scores.jsonl")
    brightness = {(row["visit"], row["image"]): row["scores"]["brightness"] for row in rows}
    expected = {}
    for pair in read_json_lines(tmp_path / "round-0000/pairs.jsonl"):
        visit, sides = pair["pair_id"].split("/")[1:]
        chosen, rejected = map(int, sides.split("-over-"))
        gap = brightness[int(visit), chosen] - brightness[int(visit), rejected]
        expected[pair["pair_id"]] = 1 / (1 + math.exp(-gap / 0.01))
        assert pair["preference"] == pytest.approx(expected[pair["pair_id"]])
    found = batch.strength["preference"].tolist()
    names = [name.rpartition("/")[0] for name in batch.sample_ids]
    assert found == pytest.approx([expected[name] for name in names])
    assert len(set(found)) > 1


def test_without_a_temperature_batches_say_nothing_of_it(prompts, settings, model, tmp_path):
    assert next(iter(start(rollouts(prompts), settings, model, tmp_path))).strength == {}


def test_the_summary_counts(prompts, settings, model, tmp_path):
    next(iter(start(rollouts(prompts), settings, model, tmp_path)))
    found = record(tmp_path)
    assert found["micro_batches"] == 12  # 9 pairs, 8 of which fill groups of 2, 3 steps each
    summary = found["summary"]
    assert (summary["images"], summary["pairs"], summary["steps"]) == (9, 9, 24)
    assert (summary["decided_share"], summary["tied_share"]) == (1, 0)
    scores = [
        row["scores"]["brightness"] for row in read_json_lines(tmp_path / "round-0000/scores.jsonl")
    ]
    values = torch.tensor(scores, dtype=torch.float64)
    assert summary["brightness_mean"] == pytest.approx(values.mean().item())
    assert summary["brightness_std"] == pytest.approx(values.std(correction=0).item())
    assert found["skipped"] == {"steps that filled no optimiser step": 3}
    assert "9 of 9 pairs decided; training on 24 of 27 steps" in found["sentence"]


def test_only_the_first_steps_train_if_so_wished(prompts, settings, model, tmp_path):
    source = start(rollouts(prompts, trained_steps=2), settings, model, tmp_path, accumulation=2)
    seen = [name for batch in islice(source, 8) for name in batch.sample_ids]
    assert Counter(name.rpartition("/")[2] for name in seen) == {"step-0": 8, "step-1": 8}
    assert (record(tmp_path)["micro_batches"], record(tmp_path)["summary"]["steps"]) == (8, 16)
    with pytest.raises(
        ConfigError, match=r"trained_steps is 4, and likelihood\.process\.steps is 3"
    ):
        start(rollouts(prompts, trained_steps=4), settings, None, tmp_path)


def test_at_the_sampling_weights_every_ratio_is_one(prompts, settings, model, tmp_path):
    likelihood = Transition(process=PROCESS)
    for batch in islice(start(rollouts(prompts), settings, model, tmp_path), 6):
        prepared = likelihood.prepare(model, batch)
        found = likelihood.evaluate(model, prepared)
        for view in ("chosen", "rejected"):
            for row, name in enumerate(batch.sample_ids):
                stored = sampled_log_likelihood(tmp_path / "round-0000", name, view)
                assert found[view][row].item() == pytest.approx(stored, abs=1e-5)


def sampled_log_likelihood(folder: Path, sample_id: str, view: str) -> float:
    pair_id, _, step = sample_id.rpartition("/step-")
    pairs = {row["pair_id"]: row for row in read_json_lines(folder / "pairs.jsonl")}
    pair = pairs[pair_id]
    with safe_open(folder / pair["file"], framework="pt") as file:
        return file.get_tensor("log_likelihoods")[int(step), pair[view]].item()


def test_both_sides_of_a_pair_share_their_start(prompts, settings, model, tmp_path):
    starts = 0
    for batch in islice(start(rollouts(prompts), settings, model, tmp_path), 12):
        for row, name in enumerate(batch.sample_ids):
            chosen, rejected = (
                batch.states[batch.state_rows[view][row]] for view in ("chosen", "rejected")
            )
            assert torch.equal(chosen, rejected) == name.endswith("/step-0")
            starts += name.endswith("/step-0")
    assert starts == 8


def test_best_against_worst_trains_on_one_pair_a_prompt(prompts, settings, model, tmp_path):
    chosen = rollouts(prompts, pairs="best_worst")
    next(iter(start(chosen, settings, model, tmp_path)))
    assert record(tmp_path)["summary"]["pairs"] == 3


def test_scorers_that_contradict_each_other_decide_nothing(prompts, settings, model, tmp_path):
    scorers = (Brightness(), Brightness(scale=-1.0))
    opposed = rollouts(prompts, scorers=scorers, prompts_per_round=1)
    with pytest.raises(DataError, match="10 rounds in a row had fewer pairs"):
        next(iter(start(opposed, settings, model, tmp_path)))
    found = record(tmp_path)
    assert found["skipped"] == {"incomparable pairs": 3}
    assert "0 of 3 pairs decided, 3 incomparable" in found["sentence"]


def test_fronts_are_what_their_scorers_do_not_beat(prompts, settings, model, tmp_path):
    next(iter(start(rollouts(prompts, pairs="fronts"), settings, model, tmp_path)))
    assert record(tmp_path)["summary"]["pairs"] == 3  # by one scorer: the best over the worst


def test_watched_scorers_are_logged_and_decide_nothing(prompts, settings, model, tmp_path, capsys):
    watch = (Brightness(scale=-1.0), JPEG())
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    next(iter(start(rollouts(prompts), settings, model, plain)))
    next(iter(start(rollouts(prompts, watch=watch), settings, model, watched)))
    pairs = "round-0000/pairs.jsonl"
    assert (watched / pairs).read_bytes() == (plain / pairs).read_bytes()
    rows = read_json_lines(watched / "round-0000/scores.jsonl")
    for row in rows:
        assert row["watched"].keys() == {"brightness", "jpeg"}
        assert row["watched"]["brightness"] == pytest.approx(-row["scores"]["brightness"], abs=1e-6)
    found = record(watched)["summary"]
    assert found["watched/brightness_mean"] == pytest.approx(-found["brightness_mean"], abs=1e-6)
    assert found["watched/brightness_std"] == pytest.approx(found["brightness_std"], abs=1e-6)
    assert found["watched/jpeg_mean"] < 0 and found["images"] == len(rows)
    assert not any("watched" in name for name in record(plain)["summary"])


def test_with_repeats_scores_are_means_over_copies_and_sure_pairs_count_more(
    prompts, settings, model, tmp_path
):
    how = Perturbation(crop=0.2, noise=40.0)
    asked = {"repeats": 4, "perturbation": how, "weight": "certainty"}
    source = start(rollouts(prompts, **asked), settings, model, tmp_path)
    batch = next(iter(source))
    folder = tmp_path / "round-0000"
    rows = read_json_lines(folder / "scores.jsonl")
    spread = {}
    for row in rows:
        pixels = pixels_of(read_image(folder / row["file"]))
        digest = hashlib.sha256((folder / row["file"]).read_bytes()).hexdigest()
        copies = torch.stack([how.copy(pixels, digest, number) for number in range(4)])
        scores = Brightness().score(copies, ["a"] * 4).double()
        assert row["scores"]["brightness"] == pytest.approx(scores.mean().item(), abs=1e-6)
        assert row["deviations"]["brightness"] == pytest.approx(scores.std().item(), abs=1e-6)
        spread[row["visit"], row["image"]] = row["deviations"]["brightness"]
    pairs = read_json_lines(folder / "pairs.jsonl")
    sides = [tuple(map(int, p["pair_id"].rpartition("/")[2].split("-over-"))) for p in pairs]
    visits = [int(p["pair_id"].split("/")[1]) for p in pairs]
    gaps = [math.hypot(spread[v, a], spread[v, b]) for v, (a, b) in zip(visits, sides, strict=True)]
    inverse = [1 / gap for gap in gaps]
    expected = [each * len(gaps) / sum(inverse) for each in inverse]
    assert [p["weight"] for p in pairs] == pytest.approx(expected, rel=1e-6)
    assert max(expected) > 1.1 * min(expected)
    weights = {p["pair_id"]: p["weight"] for p in pairs}
    seen = [weights[name.rpartition("/")[0]] for name in batch.sample_ids]
    assert batch.strength["weight"].tolist() == pytest.approx(seen)
    mean = record(tmp_path)["summary"]["brightness_deviation"]
    assert mean == pytest.approx(sum(spread.values()) / len(spread))


def test_deviations_are_of_several_copies(prompts):
    with pytest.raises(ValueError, match=r"weight is certainty.*set repeats to 4 or so"):
        rollouts(prompts, weight="certainty")
    with pytest.raises(ValueError, match=r"perturbation says how copies .* and repeats is 1"):
        rollouts(prompts, perturbation=Perturbation(noise=1.0))
    judged = (Pairwise(judge=LeaningJudge()),)
    with pytest.raises(ValueError, match=r"rollouts\.repeats scores every image by itself"):
        rollouts(prompts, scorers=judged, repeats=2)
    with pytest.raises(ValueError, match=r"rollouts\.watch scores every image by itself"):
        rollouts(prompts, watch=judged)


def test_a_pair_judge_compares_the_images_of_a_visit(prompts, settings, model, tmp_path):
    judge = LeaningJudge(slope=50.0, lean=1.0)
    next(
        iter(start(rollouts(prompts, scorers=(Pairwise(judge=judge),)), settings, model, tmp_path))
    )
    next(iter(start(rollouts(prompts), settings, model, tmp_path / "plain")))
    found, plain = (
        [row["pair_id"] for row in read_json_lines(folder / "round-0000/pairs.jsonl")]
        for folder in (tmp_path, tmp_path / "plain")
    )
    assert found == plain  # the brighter image wins, whichever is shown first
    rows = read_json_lines(tmp_path / "round-0000/scores.jsonl")
    for visit in range(3):
        won = [row["scores"]["pairwise"] for row in rows if row["visit"] == visit]
        assert sum(won) == pytest.approx(1.5, abs=1e-5)


def test_a_run_may_go_on_with_other_watched_scorers(prompts, settings, tmp_path):
    plain = start(rollouts(prompts), settings, None, tmp_path)
    watched = start(rollouts(prompts, watch=(JPEG(),)), settings, None, tmp_path)
    assert plain.fingerprint() == watched.fingerprint()


def test_images_without_a_score_make_no_pair_and_are_counted(prompts, settings, model, tmp_path):
    prompts.write_text("a cat\nnan\nfog\n")
    next(iter(start(rollouts(prompts), settings, model, tmp_path)))
    found = record(tmp_path)
    assert found["skipped"]["images without a finite score by brightness"] == 3
    assert found["summary"]["pairs"] == 6
    assert (tmp_path / "round-0000/grid.png").exists()


def test_a_scorer_that_never_says_a_number_stops_the_run(prompts, settings, model, tmp_path):
    prompts.write_text("nan\n")
    with pytest.raises(DataError, match="scorer brightness gave none of the round's 9 images a"):
        next(iter(start(rollouts(prompts), settings, model, tmp_path)))


def test_an_image_that_broke_makes_no_pair(prompts, settings, model, tmp_path, monkeypatch):
    generate = d3po.sample_groups

    def breaking(*arguments, **options):
        trajectories = generate(*arguments, **options)
        trajectories.latents[1, 0] = torch.nan
        return trajectories

    monkeypatch.setattr(d3po, "sample_groups", breaking)
    next(iter(start(rollouts(prompts), settings, model, tmp_path)))
    found = record(tmp_path)
    assert found["skipped"]["images that were not finite"] == 2  # the first of either batch
    assert not (tmp_path / "round-0000/images/0000-0.png").exists()
    assert found["summary"]["pairs"] == 1 + 3 + 1


def test_a_round_that_was_trained_on_keeps_its_images_alone(prompts, settings, model, tmp_path):
    source = start(rollouts(prompts, kept_images=4), settings, model, tmp_path)
    list(islice(source, 13))  # the first round has 12
    source.release(source.state_dict())
    assert not list((tmp_path / "round-0000/latents").iterdir())
    assert len(read_json_lines(tmp_path / "round-0000/scores.jsonl")) == 9
    assert len(list((tmp_path / "round-0000/images").iterdir())) == 4
    assert list((tmp_path / "round-0001/latents").iterdir())


@pytest.mark.slow
def test_killed_at_any_write_a_round_comes_out_the_same(
    prompts, settings, model, tmp_path, monkeypatch
):
    small = rollouts(prompts, prompts_per_round=2, prompts_per_batch=1, images_per_prompt=2)

    def one_batch(folder):
        return next(iter(start(small, settings, model, folder, samples_per_device=1)))

    whole = one_batch(tmp_path / "whole")
    expected = files(tmp_path / "whole")
    replace, writes = Path.replace, 0
    while True:
        left = writes

        def failing(draft, target):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return replace(draft, target)

        monkeypatch.setattr(Path, "replace", failing)
        folder = tmp_path / str(writes)
        try:
            one_batch(folder)
        except Killed:
            monkeypatch.setattr(Path, "replace", replace)
            batch = one_batch(folder)
            assert batch.sample_ids == whole.sample_ids
            assert torch.equal(batch.states, whole.states)
            found = {
                name: content for name, content in files(folder).items() if ".part" not in name
            }
            assert found == expected, f"killed at write {writes}"
        else:
            break
        writes += 1
    assert (
        writes >= 1 + 2 * 3 + 2 + 3
    )  # started; images, latents and scores of 2 works; round summary


def test_it_needs_the_steps_of_a_sampler(prompts, settings, tmp_path):
    with pytest.raises(ConfigError, match=r"set likelihood\.kind to transition"):
        rollouts(prompts).open(row_metadata(tmp_path, model=settings))


def test_other_prompts_and_other_scorers_are_another_run(prompts, settings, tmp_path):
    def fingerprint(file=prompts, **changes):
        return start(rollouts(file, **changes), settings, None, tmp_path).fingerprint()

    first = fingerprint()
    assert fingerprint(scorers=(Brightness(scale=2.0),)) != first
    copied = tmp_path / "moved.txt"
    copied.write_text(prompts.read_text())
    assert fingerprint(copied) == first
    copied.write_text("another\n")
    assert fingerprint(copied) != first


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("images_per_prompt: 1", "one has none to be compared with"),
        ("scorers: []", "scorers is empty"),
        ("scorers: [{kind: nobody}]", r"rollouts\.scorers\[0\]\.kind: there is no 'nobody'"),
        ("scorers: [{kind: tests.comparison.brightness, scale: big}]", r"scorers\[0\]\.scale must"),
        ("prompts_per_round: 0", "prompts_per_round must be at least 1"),
        ("size: [512]", r"size must be \[height, width\] .* got \[512\]"),
        ("size: [510, 512]", "multiples of 8"),
        ("pairs: some", "must be one of all, best_worst"),
        ("previewed_prompts: -1", "must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, keys, message):
    given = {
        "scorers": "[{kind: tests.comparison.brightness}]",
        "prompts_per_round": "4",
        "prompts": "p.txt",
    }
    name, _, value = keys.partition(": ")
    lines = [f"  {key}: {text}\n" for key, text in (given | {name: value}).items()]
    path = tmp_path / "run.yaml"
    path.write_text("rollouts:\n  kind: d3po\n" + "".join(lines))
    with pytest.raises(ConfigError, match=message):
        config.load(Section, path)


def test_a_scorer_of_noisy_images_is_sent_to_spo(prompts):
    class Timed(Brightness):
        takes_time = True

    with pytest.raises(ValueError, match="these are finished; spo takes such"):
        rollouts(prompts, scorers=(Timed(),))
