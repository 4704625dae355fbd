"""Reference values that were computed before: as if the reference had been run."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from packaging.version import Version
from rich.console import Console

from diffalign import config
from diffalign.cache.references import ReferenceWriter
from diffalign.errors import CacheError, ConfigError
from diffalign.files import read_json_lines
from diffalign.jobs import precompute, train
from diffalign.likelihoods.pair_numbers import PAIR_NUMBERS
from diffalign.training import build
from diffalign.training.config import RunConfig
from tests.judged_responses import write_judged_responses
from tests.runs import figures, files
from tests.tiny_vlm import tiny_llava

RUN = """
output: {folder}/run
model: {{kind: vlm, path: {folder}/llava, lora: {{rank: 2}}}}
responses:
  path: {folder}/responses.jsonl
  kind: tests.judged_responses
  workers: 0
  visits: 2
  conditions: {{crop: {{kind: crop}}, diffuse: {{kind: diffuse}}}}
  weights: {{score: {{kind: scores, by_score: {{"2": 2.0}}}}}}
likelihood: {{kind: tokens, gains: {{gain: {{condition: diffuse}}}}}}
objective:
  kind: weighted_sum
  terms:
    - objective: {{kind: dpo, beta: 0.1}}
    - {{objective: {{kind: dpo, beta: 0.1}}, views: {{rejected: chosen@crop}}}}
    - {{objective: {{kind: dpo, beta: 0.1}}, views: {{rejected: 'rejected:score'}}}}
    - objective: {{kind: anchor, beta: 0.1}}
optimizer: {{lr: 1.0e-2}}
training: {{optimizer_steps: 6, samples_per_device: 3, log_every: 1}}
"""
"""Three epochs, of which the last shows the first sample again."""
DPO = "objective={kind: dpo, beta: 0.1}"
COUNTED = re.compile(r"accuracy|^fell/|^displaced").search
"""Names of figures that count what is more or less probable than under the reference."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precompute")
    tiny_llava(folder / "llava")
    write_judged_responses(folder)
    (folder / "run.yaml").write_text(RUN.format(folder=folder))
    return folder


def run_of(folder: Path, *overrides: str) -> RunConfig:
    return config.load(RunConfig, folder / "run.yaml", list(overrides))


@pytest.fixture(scope="module")
def computed(folder) -> ReferenceWriter:
    return precompute.run(run_of(folder, f"reference_cache={folder / 'cache'}"), pairs_per_shard=4)


@pytest.mark.parametrize("shape", ["lora={rank: 2, dropout: 0.1}", "lora=null"])
def test_a_run_with_known_values_equals_one_that_runs_its_reference(
    folder, computed, tmp_path, shape
):
    live = run_of(folder, f"model.{shape}", f"output={tmp_path / 'live'}")
    known = dataclasses.replace(
        live, output=tmp_path / "known", reference="cached", reference_cache=computed.folder
    )
    for run in (live, known):
        train.run(run)
    rows = list(zip(figures(live.output), figures(known.output), strict=True))
    assert len(rows) == 6
    # Policy and reference are one at the first step, where old kernels round them apart.
    for row in rows[0] if Version(torch.__version__) < Version("2.9") else ():
        for name in filter(COUNTED, list(row)):
            del row[name]
    for ours, theirs in rows:
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-4)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    before, after = (
        read_json_lines(run.output / "timing.jsonl")[-1]["network_rows"] for run in (live, known)
    )
    assert before == 2 * after


def test_a_killed_computation_goes_on_and_writes_the_same(folder, computed, tmp_path):
    run = run_of(folder, f"output={tmp_path}")
    whole = files(computed.folder)
    assert len(whole) == 5
    again = precompute.run(run, pairs_per_shard=4)
    assert again.folder == tmp_path / "cache/references"
    assert files(again.folder) == whole
    names = sorted(set(whole) - {"index.json"})
    (again.folder / names[1]).unlink()
    kept = (again.folder / names[0]).stat().st_mtime_ns
    precompute.run(run, pairs_per_shard=4)
    assert files(again.folder) == whole
    assert (again.folder / names[0]).stat().st_mtime_ns == kept


def test_numbers_of_pairs_are_computed_and_rank_them(folder, tmp_path, capsys):
    file = tmp_path / "numbers.parquet"
    whole = run_of(folder, DPO, f"output={tmp_path / 'all'}")
    precompute.run(whole, scores=file)
    assert "{file: " in "".join(capsys.readouterr().out.split("\n"))
    table = pq.read_table(file)
    assert table.column_names[1:] == [*PAIR_NUMBERS]
    columns = table["ches_normalised"].to_pylist(), table["sample_id"].to_pylist()
    ranked = sorted(zip(*columns, strict=True))
    ranking = f"responses.ranking={{file: {file}, by: ches_normalised, keep: 0.5}}"
    run = run_of(folder, DPO, ranking, f"output={tmp_path / 'half'}")
    train.run(run)
    source = build.build_source(run, Console(quiet=True), skipped=None)
    seen = {name for batch in source.ahead(4) for name in batch.sample_ids}
    assert seen == {name for _, name in ranked[: len(ranked) // 2]}
    first = file.read_bytes()
    precompute.run(run, scores=file)  # of all pairs, whatever the run takes of them
    assert file.read_bytes() == first
    assert not (tmp_path / ".numbers.parquet.blocks").exists()


def test_pairs_that_cannot_be_used_are_left_out_and_never_asked_for(folder, tmp_path, capsys):
    lines = (folder / "responses.jsonl").read_text().replace('["own-0.png"]', '["gone.png"]', 1)
    broken = folder / "broken.jsonl"
    broken.write_text(lines)
    run = run_of(
        folder,
        f"responses.path={broken}",
        "responses.max_bad_fraction=0.5",
        "training.optimizer_steps=2",
        f"output={tmp_path}",
        DPO,
    )
    precompute.run(run, pairs_per_shard=4)
    assert "pairs skipped as unusable: 1 missing image" in capsys.readouterr().out
    train.run(dataclasses.replace(run, reference="cached"))
    assert figures(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("responses.max_length=99", "responses.max_length was 2048 there and is 99 here"),
        ("responses.conditions.crop.largest=0.5", r"responses\.conditions\.crop was"),
        ("responses.weights.score.by_score={'2': 3.0}", r"responses\.weights\.score was"),
        ("seed=1", "seed was 0 there and is 1 here"),
        ("likelihood.reduction=mean", "likelihood.reduction was 'sum' there"),
        ("training.precision=bf16", "training.precision was 'float32' there"),
        ("responses.limit=5", "data was"),
        ("responses.visits=3", "has 2 samples, and responses.visits is 3"),
    ],
)
def test_values_of_other_settings_are_refused(folder, computed, tmp_path, override, key):
    known = ("reference=cached", f"reference_cache={computed.folder}", f"output={tmp_path / 'x'}")
    with pytest.raises(CacheError, match=f"{key}.*diffalign precompute"):
        train.run(run_of(folder, *known, override))


def test_another_objective_adapter_and_length_may_share_them(folder, computed, tmp_path):
    known = ("reference=cached", f"reference_cache={computed.folder}", f"output={tmp_path / 'x'}")
    more = ("model.lora.rank=4", "training.optimizer_steps=1", "likelihood.concatenated=false")
    train.run(run_of(folder, *known, DPO, *more, "seed=7", "responses.visits=null"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("responses.visits=null",), r"crop.*samples anew.*set it to the number of samples"),
        (("objective={kind: orpo}",), "orpo compares with no reference"),
        (("objective={kind: tdpo, beta: 0.1}", "likelihood.divergence=true"), "whole vocabulary"),
        (
            (
                "objective={kind: weighted_sum, terms: [{objective: {kind: dpo, beta: 0.1}, "
                "views: {chosen: 'chosen:gain'}}]}",
            ),
            "chosen:gain is made by the policy as it is",
        ),
    ],
)
def test_what_cannot_be_known_in_advance_is_refused(folder, overrides, message):
    with pytest.raises(ConfigError, match=message):
        precompute.check(run_of(folder, *overrides))


def test_held_out_responses_are_evaluated_without_a_reference(folder, tmp_path):
    more = ("responses.holdout=0.3", "training.optimizer_steps=2", f"output={tmp_path / 'live'}")
    live = run_of(folder, *more, "evaluation.every=2")
    known = dataclasses.replace(live, output=tmp_path / "known", reference="cached")
    precompute.run(known)
    for run in (live, known):
        train.run(run)
    for ours, theirs in zip(figures(live.output), figures(known.output), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-4)
    assert "held_out/loss" in figures(known.output)[-1]
