"""The reference's values of image pairs, computed before: as if the reference had been run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from diffalign import config
from diffalign.cache import shards
from diffalign.cache.references import CachedReference
from diffalign.data.score_columns import read_score_column
from diffalign.errors import CacheError, ConfigError
from diffalign.files import read_json_lines
from diffalign.jobs import precompute, train
from diffalign.training import build
from diffalign.training.config import RunConfig
from diffalign.training.reference import open_cached, resolve_reference
from tests import layouts
from tests.runs import figures, forget_accelerate
from tests.tiny_models import write_sd3, write_sd15, write_sdxl

CONFIGS = Path(__file__).parents[2] / "configs"
RUN = """
output: {folder}/run
model: {{kind: sd15, path: {folder}/sd15, lora: {{rank: 2, dropout: 0.1}}}}
data:
  path: {folder}/data
  resolution: 32
  workers: 0
  visits: 3
likelihood: {{kind: denoising}}
objective: {{kind: dpo, beta: 10}}
optimizer: {{lr: 1.0e-3, warmup_steps: 0, eps: 1.0e-3}}
training: {{optimizer_steps: 6, samples_per_device: 4, log_every: 1}}
"""
"""Eight pairs, three epochs; eps above most gradients, since AdamW takes whole steps for the
rounding of small ones otherwise."""
WRITERS = {"sd15": write_sd15, "sdxl": write_sdxl, "sd3": write_sd3}
FULL = "model.lora=null"
DPO = ("objective={kind: dpo, beta: 10}",)
IPO = ("objective={kind: ipo, beta: 10}", FULL)
KTO = ("objective={kind: kto, beta: 10}", "training.accumulation=2", "training.optimizer_steps=3")
"""Of all micro-batches of a step it has to know the log-ratios before any is differentiated."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precompute")
    for name, write in WRITERS.items():
        write(folder / name)
    (folder / "data").mkdir()
    layouts.write_jsonl(folder / "data", layouts.make_pairs(8, size=(48, 32)))
    (folder / "run.yaml").write_text(RUN.format(folder=folder))
    return folder


def run_of(folder: Path, *overrides: str) -> RunConfig:
    return config.load(RunConfig, folder / "run.yaml", list(overrides))


@pytest.fixture(scope="module")
def computed(folder) -> dict[str, Path]:
    """A folder of values for each backbone, computed under DPO with an adapter."""
    return {name: values_of(folder, name) for name in WRITERS}


def backbone(folder: Path, name: str) -> list[str]:
    return [f"model.kind={name}", f"model.path={folder / name}"]


def values_of(folder: Path, name: str, *overrides: str) -> Path:
    cache = folder / f"cache-{name}"
    compute(folder, cache, *backbone(folder, name), *overrides)
    return cache


def compute(folder: Path, cache: Path, *overrides: str) -> None:
    settings = (f"output={cache}-run", f"reference_cache={cache}", *overrides)
    precompute.run(run_of(folder, *settings), pairs_per_shard=3)
    forget_accelerate()


def trained(run: RunConfig) -> dict[str, torch.Tensor]:
    final = train.run(run)
    forget_accelerate()
    return exported(final)


def exported(final: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(final.rglob("*.safetensors")):
        found |= {f"{path.name}/{name}": value for name, value in load_file(path).items()}
    assert found
    return found


def both(folder: Path, cache: Path, tmp_path: Path, *overrides: str) -> list[RunConfig]:
    """A run that runs its reference, and the same with the values of a folder."""
    live = run_of(folder, *overrides, f"output={tmp_path / 'live'}")
    known = dataclasses.replace(
        live, output=tmp_path / "known", reference="cached", reference_cache=cache
    )
    return [live, known]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        pytest.param(name, more, marks=[] if (name, more) == ("sd15", IPO) else pytest.mark.slow)
        for name in WRITERS
        for more in (DPO, IPO, KTO)
    ],
)
def test_a_run_with_known_values_equals_one_that_runs_its_reference(
    folder, computed, tmp_path, name, more
):
    live, known = both(folder, computed[name], tmp_path, *backbone(folder, name), *more)
    known = dataclasses.replace(
        known,
        model=dataclasses.replace(known.model, encoders="cached"),
        encodings_cache=Path(f"{computed[name]}-run/cache/encodings"),
    )
    before, after = trained(live), trained(known)
    rows = list(zip(figures(live.output), figures(known.output), strict=True))
    assert len(rows) == live.training.optimizer_steps
    for ours, theirs in rows:
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        drift = {key for key in ours if key.startswith("drift/")}
        assert {*drift} == {"drift/chosen", "drift/rejected"}
        for key in drift:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-6)
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, atol=1e-6, rtol=0)
    ran = [read_json_lines(r.output / "timing.jsonl")[-1]["network_rows"] for r in (live, known)]
    policy = 2 if more == KTO else 1  # evaluations of the policy a micro-batch
    assert ran[0] * policy == ran[1] * (policy + 1)


@pytest.mark.slow
def test_no_reference_network_is_loaded(folder, computed, tmp_path, monkeypatch):
    asked = []
    kind = type(run_of(folder).model)
    load = kind.load

    def noted(self, **arguments):
        asked.append(arguments["reference"])
        return load(self, **arguments)

    monkeypatch.setattr(kind, "load", noted)
    for run in both(folder, computed["sd15"], tmp_path, FULL, "training.optimizer_steps=1"):
        train.run(run)
        forget_accelerate()
    assert asked == ["frozen_copy", "none"]


def known_of(folder: Path, cache: Path, tmp_path: Path, *overrides: str) -> RunConfig:
    settings = ("reference=cached", f"reference_cache={cache}", f"output={tmp_path / 'run'}")
    return run_of(folder, *settings, *overrides)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "seed was 0 there and is 1 here"),
        ("data.visits=4", "data.visits was 3 there and is 4 here"),
        ("data.flip=false", "data.flip was True there"),
        ("data.crop=random", "data.crop was 'center' there"),
        ("data.resolution=16", "data.resolution was 32 there"),
        ("data.caption_dropout=0", r"data.caption_dropout was 0\.2 there and is 0"),
        ("data.limit=5", "data was"),
        ("data.holdout=0.3", "data.holdout was None there"),
        ("likelihood.timesteps.high=500", "likelihood.timesteps.high was None there"),
        ("model.vae_dtype=bf16", "model.vae_dtype was 'float32' there and is 'bf16' here"),
        ("model.vae_tiling=true", "model.vae_tiling was False there and is True here"),
        ("training.precision=bf16", "training.precision was 'float32' there"),
        ("model.prediction_type=v_prediction", "model.prediction_type was 'epsilon' there"),
    ],
)
def test_values_of_other_settings_are_refused(folder, computed, tmp_path, override, key):
    with pytest.raises(CacheError, match=f"{key}.*diffalign precompute"):
        train.run(known_of(folder, computed["sd15"], tmp_path, override, "data.reuse_visits=true"))
    forget_accelerate()
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_another_model_is_refused_by_the_part_that_differs(folder, computed, tmp_path, part):
    shutil.copytree(folder / "sd15", tmp_path / "other")
    (path,) = (tmp_path / "other" / part).glob("*.safetensors")
    tensors = load_file(path)
    first = sorted(tensors)[0]
    tensors[first] = tensors[first] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    run = known_of(folder, computed["sd15"], tmp_path, f"model.path={tmp_path / 'other'}")
    with pytest.raises(CacheError, match=f"model's {part} was "):
        train.run(run)
    forget_accelerate()


def test_the_bits_of_the_base_are_among_what_values_depend_on(folder):
    found = [
        run_of(folder, f"model.quantization={bits}").model.reference_settings()
        for bits in ("null", "8bit", "4bit")
    ]
    assert [settings["model.quantization"] for settings in found] == [None, "8bit", "4bit"]
    assert len({str({**s, "model.quantization": 0}) for s in found}) == 1


def test_a_value_that_does_not_come_out_again_stops_the_run_before_it_trains(
    folder, computed, tmp_path, monkeypatch
):
    called = CachedReference.__call__

    def changed(self, sample_ids, visits):
        found = called(self, sample_ids, visits)
        return {view: values * (1 + 3e-4) for view, values in found.items()}

    monkeypatch.setattr(CachedReference, "__call__", changed)
    message = (
        r"the reference's value of .*, visit \d, \w+, is -\d.* and comes out as -\d.* now, more "
        r"than 0\.0001 apart.*compute it again with diffalign precompute"
    )
    with pytest.raises(CacheError, match=message):
        train.run(known_of(folder, computed["sd15"], tmp_path))
    forget_accelerate()
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_that_takes_more_draws_than_there_are_is_refused_before_weights(
    folder, computed, tmp_path, capsys, monkeypatch
):
    more = "training.optimizer_steps=7"  # 28 of 24 pairs
    kind = type(run_of(folder).model)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "load", lambda *_, **__: pytest.fail("weights are loaded"))
        with pytest.raises(
            ConfigError,
            match=r"data.visits is 3, and this run sees a pair up to 4 times.*Set data.visits to 4 "
            r"and precompute again, take fewer training.optimizer_steps, .*reuse_visits: true",
        ):
            train.run(known_of(folder, computed["sd15"], tmp_path, more))
        forget_accelerate()
    train.run(known_of(folder, computed["sd15"], tmp_path, more, "data.reuse_visits=true"))
    forget_accelerate()
    said = capsys.readouterr().out
    assert "has 3 draws" in said and "sees a pair up to 4 times: they come again" in said


@pytest.mark.slow
def test_buckets_and_unusable_pairs_are_as_they_are_without(folder, tmp_path):
    (tmp_path / "data").mkdir()
    layouts.write_jsonl(
        tmp_path / "data",
        [*layouts.make_pairs(5, size=(64, 32)), *layouts.make_pairs(5, size=(32, 64))],
    )
    rows = [json.loads(line) for line in (tmp_path / "data/pairs.jsonl").read_text().splitlines()]
    rows[2]["chosen"] = "gone.png"
    (tmp_path / "data/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = (
        *(f"data.path={tmp_path / 'data'}", "data.buckets=true", "data.max_bad_fraction=0.5"),
        *("data.caption_dropout=0.5", "data.reuse_visits=true", "training.samples_per_device=2"),
    )
    cache = tmp_path / "cache"
    compute(folder, cache, *more)
    live, known = both(folder, cache, tmp_path, *more)
    before, after = trained(live), trained(known)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_held_out_pairs_are_evaluated_without_a_reference_network(folder, tmp_path):
    more = ("data.holdout=0.4", "evaluation.every=2", "evaluation.visits=2", FULL)
    more = (*more, "data.reuse_visits=true")
    cache = tmp_path / "cache"
    compute(folder, cache, *more)
    live, known = both(folder, cache, tmp_path, *more)
    for run in (live, known):
        train.run(run)
        forget_accelerate()
    rows = list(zip(figures(live.output), figures(known.output), strict=True))
    evaluated = [pair for pair in rows if "held_out/loss" in pair[0]]
    assert len(evaluated) == 4  # before the first step and after steps 2, 4, 6
    for ours, theirs in evaluated:
        for key in ("held_out/loss", "held_out/drift/chosen", "held_out/drift/rejected"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-6)
    assert evaluated[-1][0]["held_out/drift/chosen"] != 0


@pytest.mark.slow
def test_a_resumed_run_compares_before_it_goes_on_and_ends_alike(folder, computed, tmp_path):
    settings = ("training.checkpoint_every=3", "training.optimizer_steps=6", FULL)
    whole = known_of(folder, computed["sd15"], tmp_path / "whole", *settings)
    expected = trained(whole)
    half = dataclasses.replace(whole, output=tmp_path / "half")
    train.run(half)
    forget_accelerate()
    shutil.rmtree(half.output / "checkpoint-6")
    train.run(half, resume=half.output)
    forget_accelerate()
    found = exported(half.output / "final")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.visits=null", "data.visits is null: time and noise .* are new at every visit"),
        ("data.streaming=true", "data.streaming is true: a stream does not know its pairs"),
    ],
)
def test_pairs_that_are_new_at_every_visit_are_refused(folder, override, message):
    with pytest.raises(ConfigError, match=message):
        resolve_reference(run_of(folder, override, "reference=cached"))


def test_without_a_number_of_visits_encodings_alone_are_computed_and_it_says_why(
    folder, tmp_path, capsys
):
    run = run_of(folder, "data.visits=null", f"output={tmp_path / 'run'}")
    precompute.run(run)
    forget_accelerate()
    assert "reference was not computed: data.visits is null" in capsys.readouterr().out
    assert not (tmp_path / "run/cache/references").exists()


def test_the_bytes_of_the_reference_are_said_and_refused_where_there_are_less(
    folder, computed, tmp_path, monkeypatch, capsys
):
    values = f"reference_cache={tmp_path / 'values'}"
    known = f"encodings_cache={computed['sd15']}-run/cache/encodings"
    settings = (f"output={tmp_path / 'run'}", values, known)
    usage = shutil.disk_usage(tmp_path)
    bytes_of_values = 8 * 2 * 3 * 4  # pairs, sides, visits
    free = bytes_of_values - 1 + shards.SPARE_BYTES
    with monkeypatch.context() as patch:
        patch.setattr(shards.shutil, "disk_usage", lambda path: usage._replace(free=free))
        with pytest.raises(
            CacheError, match=r"values would take 192 bytes .*a smaller data\.visits"
        ):
            precompute.run(run_of(folder, *settings))
    forget_accelerate()
    assert "chosen, rejected; 3 visits: 192 bytes in 3 files" in capsys.readouterr().out
    assert not list((tmp_path / "values").glob("*.safetensors"))
    precompute.run(run_of(folder, *settings))
    forget_accelerate()
    found = [t for f in (tmp_path / "values").glob("*.safetensors") for t in load_file(f).values()]
    assert sum(tensor.nbytes for tensor in found) == bytes_of_values


def test_tar_shards_are_refused_once_they_are_opened(folder, tmp_path):
    layouts.write_webdataset(tmp_path, layouts.make_pairs(3))
    run = run_of(folder, f"data.path={tmp_path}", "reference=cached")
    source = build.build_source(run, Console(quiet=True), skipped=None)
    with pytest.raises(ConfigError, match="a stream does not know its pairs in advance"):
        open_cached(run, source)


SERVED = {
    *("dpo", "ipo", "hinge", "kto", "weighted_sum", "exo", "two_betas", "diffusion_rpo"),
    "margin_regression",
}
"""Objectives of the configs of image pairs that compare with a reference."""
REASONS = {
    "d3po": "rollouts d3po samples from the policy as it trains",
    "human_feedback": "rollouts human_feedback samples from the policy as it trains",
    "spo": "rollouts spo samples from the policy as it trains",
    "seppo": "rollouts seppo samples from the policy as it trains",
    "response_advantages": "rollouts response_advantages samples from the policy as it trains",
    "response_pairs": "rollouts response_pairs samples from the policy as it trains",
    "self_play": "rollouts self_play samples from the policy as it trains",
    "dspo": "likelihood.distance compares predictions of policy and reference",
    "inverted": "likelihood.inversion lets the model find the noise of an image in every step",
}


def image_configs() -> list[Path]:
    found = [path for path in sorted(CONFIGS.rglob("*.yaml")) if "objective:" in path.read_text()]
    return [path for path in found if "responses:" not in path.read_text()]


def test_there_are_configs_of_every_objective():
    kinds = {config.load(RunConfig, path).objective.__class__.__name__ for path in image_configs()}
    assert {"DPO", "MaPO", "SePPO", "KTO", "IPO", "Hinge", "BradleyTerry"} <= kinds


@pytest.mark.parametrize("path", image_configs(), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_each_config_is_served_or_refused_with_its_reason(path):
    run = config.load(RunConfig, path, ["reference=cached"])
    kind = run.objective.__class__.__module__.rsplit(".", 1)[1]
    if run.rollouts is not None:
        kind = run.rollouts.__class__.__module__.rsplit(".", 1)[1]
    elif getattr(run.likelihood, "inversion", None) is not None:
        kind = "inverted"
    reason = REASONS.get(kind)
    if reason is None and not run.objective.needs_reference:
        reason = f"{kind} compares with no reference"
    if reason is not None:
        with pytest.raises(ConfigError, match=reason):
            resolve_reference(run)
        return
    assert kind in SERVED
    with pytest.raises(ConfigError, match=r"data\.visits is null|data\.streaming is true"):
        resolve_reference(run)
    settings = ["reference=cached", "data.visits=5", "data.streaming=false"]
    known = config.load(RunConfig, path, settings)
    assert resolve_reference(known) == "cached"


OTHERS = {
    "ipo": "beta: 1",
    "hinge": "beta: 1",
    "cdpo": "beta: 1, label_smoothing: 0.1",
    "robust": "beta: 1, flip_rate: 0.1",
    "exo": "beta: 1",
    "f_dpo": "beta: 1, divergence: js",
    "kto": "beta: 1",
    "sppo": "beta: 1",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_one_folder_serves_every_objective_of_two_numbers(folder, computed, tmp_path, kind):
    objective = f"objective={{kind: {kind}, {OTHERS[kind]}}}"
    run = known_of(folder, computed["sd15"], tmp_path, objective, "likelihood.safeguard=0.9")
    assert resolve_reference(run) == "cached"
    source = build.build_source(run, Console(quiet=True), skipped=None)
    values = open_cached(run, source)
    batch = next(iter(source))
    found = values(batch.sample_ids, batch.visits)
    assert found.keys() == {"chosen", "rejected"}


def test_what_the_reference_says_of_images_orders_their_pairs(folder, tmp_path):
    run = run_of(
        folder,
        *backbone(folder, "sd15"),
        f"reference_cache={tmp_path / 'values'}",
        f"output={tmp_path / 'run'}",
    )
    scores = tmp_path / "reference.parquet"
    precompute.run(run, scores=scores)
    column = read_score_column(scores)
    assert column.scorer.kind == "reference" and column.has_deviations
    assert len(column.rows) == 16
    known = open_cached(
        dataclasses.replace(run, reference="cached"),
        build.build_source(run, Console(quiet=True), skipped=None),
    )
    gaps = {}
    for number, pair in enumerate(layouts.make_pairs(8, size=(48, 32))):
        sides = {}
        for view, content in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            row = column.rows[hashlib.sha256(content).hexdigest(), pair.caption]
            visits = known.all_of(f"pairs.jsonl:{number + 1}")[view]
            assert row.score == pytest.approx(sum(visits) / 3)
            assert row.deviation == pytest.approx(statistics.stdev(visits))
            sides[view] = row.score
        gaps[number] = sides["chosen"] - sides["rejected"]
    hardest = sorted(gaps, key=gaps.__getitem__)[:4]
    ordered = run_of(
        folder,
        *backbone(folder, "sd15"),
        f"data.scores.columns.ref.file={scores}",
        "data.scores.columns.ref.scorer=reference",
        "data.scores.order={by: ref, bands: 2, first: small_gap}",
    )
    source = build.build_source(ordered, Console(quiet=True), skipped=None)
    first = next(iter(source))
    assert {int(name.rpartition(":")[2]) - 1 for name in first.sample_ids} == set(hardest)


@pytest.mark.parametrize(
    ("overrides", "file", "said"),
    [
        (["data.visits=null"], "x.parquet", "and this run has none that is known in advance"),
        ([], "x.jsonl", "a file of scores is named .parquet"),
    ],
)
def test_scores_of_no_reference_are_refused(overrides, file, said, folder, tmp_path):
    with pytest.raises(ConfigError, match=said):
        precompute.run(run_of(folder, *overrides), scores=tmp_path / file)
