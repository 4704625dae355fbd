"""SePPO's rounds: what is generated, and that nothing but the round decides it."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffalign import config, world
from diffalign.data.layout import Layout
from diffalign.data.pairs.config import PairConfig
from diffalign.errors import ConfigError, DataError
from diffalign.files import read_json_lines
from diffalign.imaging.image_files import pixels_of
from diffalign.jobs import train
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.lora import LoraSettings
from diffalign.rollouts import seppo as seppo
from diffalign.rollouts.seppo import SemiPolicy
from diffalign.scorers.jpeg import JPEG
from diffalign.training.config import RunConfig
from diffalign.training.reference import resolve_reference
from tests.comparison.brightness import Brightness
from tests.data.conftest import open_source
from tests.layouts import (
    WINNER_WRITERS,
    Pair,
    encoded,
    make_pairs,
    solid_image,
    write_pickapic,
    write_winning_folder,
)
from tests.processes import run_ranks
from tests.rollouts.runs import row_metadata
from tests.runs import Killed, figures, forget_accelerate

CONFIG = Path(__file__).parents[2] / "configs/playground/seppo.yaml"
FAST = ReverseProcess(steps=2, guidance=2.0, eta=0.0)
SETTINGS: dict[str, Any] = {
    "updates_per_round": 2,
    "process": FAST,
    "images_per_batch": 2,
    "previewed_prompts": 1,
}


@pytest.fixture(scope="module")
def winners(tmp_path_factory) -> Path:
    """Eight preferred images alone."""
    return write_winning_folder(tmp_path_factory.mktemp("winners"), make_pairs(8))


def load_model(folder: Path):
    settings = SD15(path=str(folder), lora=LoraSettings(rank=2))
    return settings.load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="past_policy"
    )


@pytest.fixture
def model(tiny_sd15):
    return load_model(tiny_sd15)


def change(model) -> None:
    """Move every trained parameter, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def open_rounds(output, data, model, *, rows=2, data_settings=None, run=None, **settings):
    """The source of a run that trains `model`, whose settings are those of a tiny SD 1.5."""
    data_settings = {"resolution": 32, "caption_dropout": 0.0, **(data_settings or {})}
    trained = SD15(path="", lora=LoraSettings(rank=2))
    object.__setattr__(trained, "noising", lambda: model.noising)
    usual = {
        "model": trained,
        "layout": Layout.start(samples_per_device=rows, accumulation=1),
        "open_data": lambda views: open_source(
            data, pairs_per_device=rows, views=views, **data_settings
        ),
    }
    source = SemiPolicy(**{**SETTINGS, **settings}).open(
        row_metadata(output, **(usual | (run or {})))
    )
    source.bind(model)
    return source


def take(source, count):
    return list(islice(iter(source), count))


def generated(batches) -> torch.Tensor:
    return torch.cat([batch.images["sampled"] for batch in batches])


def test_watched_scorers_look_at_what_was_sampled(tmp_path, model, winners):
    watch = (Brightness(scale=2.0), JPEG())
    both = {"scorers": (Brightness(),), "watch": watch}
    take(open_rounds(tmp_path / "both", winners, model, **both), 1)
    take(open_rounds(tmp_path / "alone", winners, model, watch=watch), 1)
    for folder in (tmp_path / "both", tmp_path / "alone"):
        rows = read_json_lines(folder / "round-0000/scores.jsonl")
        assert len(rows) == 4 and all(r["watched"].keys() == {"brightness", "jpeg"} for r in rows)
        record = json.loads((folder / "round-0000/round.json").read_text())["harvest"]
        values = [row["watched"]["brightness"] for row in rows]
        found = record["summary"]
        assert found["watched/brightness_mean"] == pytest.approx(sum(values) / 4)
        assert found["images"] == 4 and "watched: jpeg" in record["sentence"]
        if folder.name == "both":
            assert found["brightness_mean"] == pytest.approx(sum(values) / 8)


# --- what a round generates
# -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "webdataset"])  # at random, and streamed
def test_a_batch_is_that_of_the_data_with_a_further_view(tmp_path, model, kind):
    data = WINNER_WRITERS[kind](tmp_path / "data", make_pairs(8))
    batches = take(open_rounds(tmp_path / "rounds", data, model), 5)  # of three rounds
    alone = open_source(
        data,
        pairs_per_device=2,
        views=frozenset({"chosen"}),
        resolution=32,
        caption_dropout=0.0,
    )
    for batch, plain in zip(batches, take(alone, 5), strict=True):
        assert batch.sample_ids == plain.sample_ids
        assert batch.noise_seeds == plain.noise_seeds
        assert torch.equal(batch.timesteps, plain.timesteps)
        assert torch.equal(batch.images["chosen"], plain.images["chosen"])
        assert set(batch.images) == {"chosen", "sampled"}
        assert batch.images["sampled"].shape == batch.images["chosen"].shape
        assert batch.original_sizes["sampled"].tolist() == [[32, 32]] * 2
        assert batch.crop_corners["sampled"].tolist() == [[0, 0]] * 2
        others = {*batch.encoding_seeds["chosen"], *batch.noise_seeds}
        assert not set(batch.encoding_seeds["sampled"]) & others
    seeds = [seed for batch in batches for seed in batch.encoding_seeds["sampled"]]
    assert len(set(seeds)) == len(seeds)


def test_the_image_is_generated_for_the_caption_that_training_drops(tmp_path, model, winners):
    told = take(open_rounds(tmp_path / "told", winners, model), 2)
    without = {"caption_dropout": 1.0}
    untold = take(open_rounds(tmp_path / "not", winners, model, data_settings=without), 2)
    assert {prompt for batch in untold for prompt in batch.prompts} == {""}
    assert torch.equal(generated(told), generated(untold))


def test_an_image_does_not_depend_on_those_generated_next_to_it(tmp_path, model, winners):
    alone = take(open_rounds(tmp_path / "one", winners, model, images_per_batch=1), 2)
    together = take(open_rounds(tmp_path / "all", winners, model, images_per_batch=4), 2)
    assert (generated(alone) - generated(together)).abs().max() <= 2.1 / 127.5  # rounding of 8 bits


def test_an_image_depends_on_the_reference_and_not_on_the_policy(tmp_path, model, winners):
    before = generated(take(open_rounds(tmp_path / "before", winners, model), 2))
    change(model)
    for rule, same in (("initial", True), ("latest", False)):
        folder = tmp_path / rule
        after = generated(take(open_rounds(folder, winners, model, reference=rule), 2))
        assert torch.equal(before, after) == same


def test_rounds_generate_anew(tmp_path, model):
    data = write_winning_folder(tmp_path / "data", make_pairs(2))
    batches = take(open_rounds(tmp_path / "rounds", data, model, updates_per_round=1), 2)
    by_round = [dict(zip(b.sample_ids, b.images["sampled"], strict=True)) for b in batches]
    assert by_round[0].keys() == by_round[1].keys()
    assert not any(torch.equal(by_round[0][name], by_round[1][name]) for name in by_round[0])


def test_an_image_that_a_round_visits_twice_gets_two(tmp_path, model):
    data = write_winning_folder(tmp_path / "data", make_pairs(2))
    first, second = take(open_rounds(tmp_path / "rounds", data, model), 2)
    assert sorted(first.sample_ids) == sorted(second.sample_ids)
    assert not torch.equal(generated([first]).sort(dim=0)[0], generated([second]).sort(dim=0)[0])
    assert len({tuple(image.flatten().tolist()) for image in generated([first, second])}) == 4


def test_what_is_generated_has_the_size_of_what_it_is_next_to(tmp_path, model):
    sizes = [(64, 32), (32, 64)] * 4
    pairs = [
        Pair(encoded(solid_image((200, 0, 0), size=size)), b"", f"thing {i}")
        for i, size in enumerate(sizes)
    ]
    data = write_winning_folder(tmp_path / "data", pairs)
    buckets = {"buckets": True, "resolution": 64}
    source = open_rounds(
        tmp_path / "rounds", data, model, data_settings=buckets, updates_per_round=6
    )
    batches = take(source, 6)
    shapes = {batch.images["sampled"].shape[-2:] for batch in batches}
    assert len(shapes) == 2
    for batch in batches:
        size = list(batch.images["chosen"].shape[-2:])
        assert list(batch.images["sampled"].shape[-2:]) == size
        assert batch.original_sizes["sampled"].tolist() == [size] * 2


def test_a_pair_lends_its_preferred_side(tmp_path, model):
    data = write_pickapic(tmp_path / "data", make_pairs(4))
    (batch,) = take(open_rounds(tmp_path / "rounds", data, model), 1)
    assert (batch.images["chosen"][:, 2] == -1).all()  # rejected ones are blue
    assert "rejected" not in batch.images


# --- what it leaves behind ----------------------------------------------------------------------


def test_a_round_can_be_looked_at(tmp_path, model, winners):
    batches = take(open_rounds(tmp_path, winners, model, scorers=(Brightness(),)), 2)
    folder = tmp_path / "round-0000"
    rows = [json.loads(line) for line in (folder / "sampled.jsonl").read_text().splitlines()]
    assert [row["sample_id"] for row in rows] == [n for b in batches for n in b.sample_ids]
    assert [row["prompt"] for row in rows] == [c for b in batches for c in b.captions]
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    for place, (row, image) in enumerate(zip(scores, generated(batches), strict=True)):
        assert row["visit"] == place
        assert torch.equal(pixels_of(Image.open(folder / row["file"])), image)
        assert row["scores"]["brightness"] == pytest.approx((image.mean().item() + 1) / 2)
    summary = json.loads((folder / "round.json").read_text())["harvest"]["summary"]
    mean = torch.tensor([row["scores"]["brightness"] for row in scores]).mean()
    assert summary["brightness_mean"] == pytest.approx(mean.item())
    assert summary["images"] == 4
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > grid.height / 2


def test_the_round_says_who_sampled(tmp_path, model, winners):
    source = open_rounds(tmp_path, winners, model, reference="latest")
    take(source, 3)
    said = [
        json.loads((tmp_path / f"round-000{i}/round.json").read_text())["harvest"]["sentence"]
        for i in range(2)
    ]
    assert said[0] == "4 images by the run's first policy"
    assert said[1] == "4 images by the policy that it began with"


def test_a_finished_round_keeps_its_first_images(tmp_path, model, winners):
    source = open_rounds(tmp_path, winners, model, kept_images=3)
    take(source, 3)
    source.release({"round": 1})
    kept = sorted(path.name for path in (tmp_path / "round-0000/images").iterdir())
    assert kept == ["000000.png", "000001.png", "000002.png"]
    assert len(list((tmp_path / "round-0001/images").iterdir())) == 4


def test_the_start_says_how_many_images_a_round_generates_and_what_past_policies_take(
    tmp_path, model, winners
):
    said = open_rounds(tmp_path, winners, model, rows=3).describe()
    assert "a round samples 6 images for 2 optimiser steps" in said
    assert not any("keeps the policy" in line for line in said)
    full = {"model": SD15(path="")}
    object.__setattr__(full["model"], "noising", lambda: model.noising)
    assert any(
        "10.3 GB for SDXL" in line
        for line in open_rounds(tmp_path, winners, model, run=full).describe()
    )


# --- resuming -----------------------------------------------------------------------------------


def fail_after(monkeypatch, count, name="sample"):
    """Let a function of the module do its work so many times, and then die."""
    whole, calls = getattr(seppo, name), []

    def some(*arguments, **keywords):
        calls.append(name)
        if len(calls) > count:
            raise Killed
        return whole(*arguments, **keywords)

    monkeypatch.setattr(seppo, name, some)
    return calls


def test_a_round_goes_on_in_its_middle_without_sampling(tmp_path, model, winners, monkeypatch):
    source = open_rounds(tmp_path, winners, model, updates_per_round=4)
    batches = iter(source)
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(source.state_dict()))
    whole = [next(batches) for _ in range(2)]
    resumed = open_rounds(tmp_path, winners, model, updates_per_round=4)
    resumed.load_state_dict(state)
    fail_after(monkeypatch, 0)
    again = take(resumed, 2)  # the second of the next round, whose images are there as well
    assert [batch.sample_ids for batch in again] == [batch.sample_ids for batch in whole]
    assert [batch.noise_seeds for batch in again] == [batch.noise_seeds for batch in whole]
    assert torch.equal(generated(again), generated(whole))


def test_a_round_goes_on_in_its_middle_on_more_processes(tmp_path, model, winners, monkeypatch):
    start = Layout.start(samples_per_device=1, accumulation=4)

    def open_with(layout):
        def open_data(views):
            settings = {"views": views, "resolution": 32, "caption_dropout": 0.0}
            return open_source(winners, layout=layout, **settings)

        run = {"layout": layout, "open_data": open_data}
        return open_rounds(tmp_path, winners, model, run=run, updates_per_round=3)

    source = open_with(start)
    take(source, 4)
    state = json.loads(json.dumps(source.state_dict()))
    whole = take(source, 8)
    fail_after(monkeypatch, 0)
    monkeypatch.setattr(world, "size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(world, "rank", lambda rank=rank: rank)
        resumed = open_with(start.on_these_processes(1))
        resumed.load_state_dict(state)
        parts.append(take(resumed, 4))
        assert resumed.state_dict() == source.state_dict()
    again = [batch for both in zip(*parts, strict=True) for batch in both]
    assert [batch.sample_ids for batch in again] == [batch.sample_ids for batch in whole]
    assert torch.equal(generated(again), generated(whole))


@pytest.mark.parametrize(
    ("name", "count"),
    [("sample", 1), ("encode_png", 3), ("write_json_lines", 0), ("render_grid", 0)],
)
def test_a_killed_round_generates_only_what_is_missing(
    tmp_path, model, winners, monkeypatch, name, count
):
    whole = take(open_rounds(tmp_path / "whole", winners, model, updates_per_round=3), 3)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        fail_after(patch, count, name)
        take(open_rounds(tmp_path / "killed", winners, model, updates_per_round=3), 1)
    done = len(list((tmp_path / "killed/round-0000/sampled").glob("*.jsonl")))
    calls = fail_after(monkeypatch, 3)
    again = take(open_rounds(tmp_path / "killed", winners, model, updates_per_round=3), 3)
    assert len(calls) == 3 - done
    assert torch.equal(generated(whole), generated(again))


def test_images_of_other_data_are_not_taken_up(tmp_path, model, winners):
    take(open_rounds(tmp_path / "rounds", winners, model), 1)
    other = write_winning_folder(tmp_path / "data", make_pairs(5))
    batches = take(open_rounds(tmp_path / "rounds", other, model), 2)
    fresh = take(open_rounds(tmp_path / "fresh", other, model), 2)
    assert torch.equal(generated(batches), generated(fresh))


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates_per_round": 0}, "updates_per_round must be at least 1, got 0"),
        ({"images_per_batch": 0}, "images_per_batch must be at least 1, got 0"),
        ({"kept_images": -1}, "kept_images must be at least 0, got -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SemiPolicy(**settings)


def test_a_process_that_the_model_cannot_follow_is_refused(tmp_path, model, winners):
    with pytest.raises(ConfigError, match=r"rollouts\.process: steps is 1001, but the model's"):
        open_rounds(tmp_path, winners, model, process=ReverseProcess(steps=1001, eta=0.0))


def test_a_likelihood_of_steps_is_refused(tmp_path, model, winners):
    with pytest.raises(ConfigError, match=r"yields images, not steps.* likelihood\.kind to den"):
        open_rounds(tmp_path, winners, model, run={"process": FAST})


def test_images_generated_for_others_are_refused(tmp_path, model, winners):
    source = open_rounds(tmp_path, winners, model)
    batches = iter(source)
    next(batches)
    file = tmp_path / "round-0000/sampled.jsonl"
    state = source.state_dict()
    file.write_text(file.read_text().replace('"sample_id": "0', '"sample_id": "1'))
    resumed = open_rounds(tmp_path, winners, model)
    resumed.load_state_dict(state)
    with pytest.raises(DataError, match=r"were sampled for 1\d+, 1\d+, and the data now gives 0"):
        take(resumed, 1)


def test_an_image_that_is_gone_is_named(tmp_path, model, winners):
    source = open_rounds(tmp_path, winners, model)
    batches = iter(source)
    next(batches)
    (tmp_path / "round-0000/images/000003.png").unlink()
    with pytest.raises(
        DataError, match=r"images/000003\.png: this image was sampled .*Delete .*ro"
    ):
        next(batches)


def test_a_reference_that_generates_nothing_finite_is_refused(tmp_path, model, winners):
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(DataError, match=r"'a red thing, number \d' held values that .* 4 times"):
        take(open_rounds(tmp_path, winners, model, reference="latest"), 1)


def test_what_is_not_finite_is_generated_again_and_counted(tmp_path, model, winners, monkeypatch):
    whole = seppo.sample
    calls = []

    def once_broken(*args, **kwargs):
        generated = whole(*args, **kwargs)
        if not calls:
            generated.latents[-1][0] = torch.nan
        calls.append(kwargs["start_seeds"])
        return generated

    monkeypatch.setattr(seppo, "sample", once_broken)
    source = open_rounds(tmp_path, winners, model)
    take(source, 1)
    assert source.skipped_counts == {"images that were not finite, sampled again": 1}
    assert len(calls[1]) == 1
    assert calls[1][0] not in calls[0]
    places = [row["place"] for row in read_json_lines(tmp_path / "round-0000/sampled.jsonl")]
    assert places == sorted(places)
    assert all((tmp_path / f"round-0000/images/{place:06d}.png").exists() for place in places)


def test_a_scorer_of_noisy_images_is_refused():
    class Noisy(Brightness):
        takes_time = True

    with pytest.raises(ValueError, match="scores noisy images at a timestep, and these are finis"):
        SemiPolicy(scorers=(Noisy(),))


# --- whole runs ---------------------------------------------------------------------------------


def load(model: Path, data: Path, output: Path, *more: str) -> RunConfig:
    return config.load(
        RunConfig,
        CONFIG,
        [
            f"model.path={model}",
            f"data.path={data}",
            f"output={output}",
            "data.resolution=32",
            "data.workers=0",
            "rollouts.scorers=[]",
            "rollouts.updates_per_round=2",
            "rollouts.process={steps: 2, guidance: 2.0, eta: 0.0}",
            "rollouts.previewed_prompts=1",
            "optimizer.lr=1e-3",
            "optimizer.schedule=constant",
            "optimizer.warmup_steps=0",
            "training.samples_per_device=2",
            "training.optimizer_steps=2",
            "training.log_every=1",
            *more,
        ],
    )


def trained(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{step}" / "weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["lora", "full"])
@pytest.mark.parametrize(
    ("kind", "folder"),
    [("sd15", "sd15"), ("sd15", "sd15_v"), ("sdxl", "sdxl"), ("sdxl", "sdxl_v")],
)
def test_two_steps_of_every_backbone(request, tmp_path, winners, kind, folder, shape):
    more = [f"model.kind={kind}", "training.optimizer_steps=2"]
    more += ["model.lora={rank: 2}"] if shape == "lora" else []
    train.run(load(request.getfixturevalue(f"tiny_{folder}"), winners, tmp_path, *more))
    first, second = figures(tmp_path)
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert (first["drift/chosen"], first["drift/sampled"], first["flipped"]) == (0, 0, 0)
    assert second["drift/sampled"] != 0


@pytest.mark.parametrize("kind", WINNER_WRITERS)
def test_every_layout_of_preferred_images_alone_trains(tmp_path, tiny_sdxl, kind):
    data = WINNER_WRITERS[kind](tmp_path / "data", make_pairs(4))
    train.run(load(tiny_sdxl, data, tmp_path / "run", "training.optimizer_steps=1"))
    assert figures(tmp_path / "run")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "lora", "kind"),
    [
        ("latest", "null", "past_policy"),
        ("initial", "null", "frozen_copy"),
        ("initial", "{rank: 2}", "adapter_off"),
    ],
    ids=["latest", "initial", "initial-lora"],
)
def test_the_reference_of_a_round_is_what_its_rule_says(
    tmp_path, tiny_sd15, winners, rule, lora, kind
):
    more = ("training.optimizer_steps=4", f"rollouts.reference={rule}", f"model.lora={lora}")
    run = load(tiny_sd15, winners, tmp_path, "model.kind=sd15", *more)
    assert resolve_reference(run) == kind
    train.run(run)
    drifts = [row["drift/chosen"] for row in figures(tmp_path)]
    assert [drift != 0 for drift in drifts] == [False, True, rule == "initial", True]


THREE_ROUNDS = (
    "model.kind=sd15",
    "model.lora={rank: 2, dropout: 0.1}",
    "rollouts.images_per_batch=2",
    "rollouts.scorers=[{kind: tests.comparison.brightness}]",
    "training.optimizer_steps=6",
    "training.checkpoint_every=1",
)


@pytest.fixture(scope="module")
def three_rounds(tmp_path_factory, tiny_sd15, winners) -> Path:
    """A run that nobody killed."""
    forget_accelerate()
    output = tmp_path_factory.mktemp("three") / "rounds"
    train.run(load(tiny_sd15, winners, output, *THREE_ROUNDS))
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("sample", 3),
        ("encode_png", 9),
        ("write_json_lines", 8),
        ("render_grid", 1),
        ("_next_to", 5),
    ],
    ids=["sampling", "writing", "scoring", "summarying", "training"],
)
def test_a_run_killed_anywhere_ends_bit_for_bit_alike(
    tmp_path, tiny_sd15, winners, three_rounds, monkeypatch, name, count
):
    killed = load(tiny_sd15, winners, tmp_path / "run", *THREE_ROUNDS)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        fail_after(patch, count, name)
        train.run(killed)
    assert not (tmp_path / "run/final").exists()
    forget_accelerate()
    train.run(killed, resume=tmp_path / "run")
    assert figures(tmp_path / "run") == figures(three_rounds)
    ours, theirs = trained(tmp_path / "run", 6), trained(three_rounds, 6)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.multiprocess
def test_one_process_and_two_generate_the_same_and_train_alike(tmp_path, tiny_sd15, winners):
    # Equal local shapes: float32 kernels round by shape, and beta multiplies that.
    more = ("model.kind=sd15", "training.optimizer_steps=3", "optimizer.lr=1e-5")
    train.run(load(tiny_sd15, winners, tmp_path / "one", *more, "training.accumulation=2"))
    both = load(tiny_sd15, winners, tmp_path / "two", *more)
    config.save(both, tmp_path / "two.yaml")
    run_ranks("train", str(tmp_path / "two.yaml"), log=tmp_path / "log")
    first, second = (tmp_path / name / "rounds/round-0000" for name in ("one", "two"))
    images = sorted(path.relative_to(first) for path in first.glob("images/*.png"))
    assert len(images) == 8
    for file in (*images, Path("sampled.jsonl")):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    for ours, theirs in zip(figures(tmp_path / "one"), figures(tmp_path / "two"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    ours, theirs = trained(tmp_path / "one", 3), trained(tmp_path / "two", 3)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


def test_a_dry_run_says_what_a_round_will_be(tmp_path, tiny_sdxl, winners, capsys):
    train.run(load(tiny_sdxl, winners, tmp_path / "run"), dry_run=True)
    said = capsys.readouterr().out
    assert "rounds of 2 optimiser steps; next to each preferred image one by one of the" in said
    assert "a round samples 4 images for 2 optimiser steps" in said
    assert not (tmp_path / "run").exists()


def test_rollouts_without_data_are_refused(tmp_path, tiny_sdxl):
    run = load(tiny_sdxl, tmp_path, tmp_path / "run")
    with pytest.raises(ConfigError, match="data is null"):
        train.run(dataclasses.replace(run, data=None))
    assert isinstance(run.data, PairConfig)
