"""How sure pairs are, through whole runs: from the votes of a file to the loss of a step."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from diffalign import config
from diffalign.errors import ConfigError
from diffalign.jobs import precompute, train
from diffalign.playground.models import playground_model_path
from diffalign.training.checks import check
from diffalign.training.config import RunConfig
from tests.layouts import make_pairs, solid_image, write_parquet, write_rows
from tests.runs import figures, forget_accelerate
from tests.tiny_vlm import tiny_llava

SMOKE = Path(__file__).parents[2] / "configs/smoke/diffusion_dpo_sdxl.yaml"
VOTES = "data.strength.preference={kind: votes}"
SHARE = "data.strength.preference={kind: votes, prior: 0}"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six pairs, each with three votes to one."""
    return write_parquet(tmp_path_factory.mktemp("voted"), make_pairs(6))


def run(data: Path, output: Path, *more: str) -> RunConfig:
    settings = [
        f"model.path={playground_model_path()}",
        f"data.path={data}",
        f"output={output}",
        "data.resolution=32",
        "optimizer.lr=1e-2",
        "objective.beta=200",
        "training.samples_per_device=2",
        *more,
    ]
    return config.load(RunConfig, SMOKE, settings)


def trained(output: Path, step: int = 2) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{step}" / "weights.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_three_votes_to_one_are_in_the_batch_and_in_the_weights(data, tmp_path):
    for name, more in (("plain", []), ("prior", [VOTES]), ("share", [SHARE])):
        train.run(run(data, tmp_path / name, *more))
    said = {name: figures(tmp_path / name) for name in ("plain", "prior", "share")}
    assert "preference" not in said["plain"][0]
    assert [row["preference"] for row in said["prior"]] == pytest.approx([2 / 3] * 2)
    assert [row["preference"] for row in said["share"]] == [0.75] * 2
    weights = [trained(tmp_path / name) for name in said]
    assert not any(equal(weights[i], weights[j]) for i, j in ((0, 1), (1, 2), (0, 2)))


def test_certain_preferences_train_as_none_to_the_last_bit(data, tmp_path):
    rows = pq.read_table(data / "pairs.parquet").to_pylist()
    for row in rows:
        row |= {"p": float(row["votes_image1"] > row["votes_image2"])}
    pairs = write_rows(tmp_path / "sure/pairs.parquet", rows).parent
    sure = "data.strength={preference: {kind: given, of: p}, columns: {p: p}}"
    train.run(run(pairs, tmp_path / "plain"))
    train.run(run(pairs, tmp_path / "given", sure))
    assert [row["preference"] for row in figures(tmp_path / "given")] == [1.0, 1.0]
    losses = [[row["loss"] for row in figures(tmp_path / n)] for n in ("plain", "given")]
    assert losses[0] == losses[1]
    assert equal(trained(tmp_path / "plain"), trained(tmp_path / "given"))


@pytest.mark.parametrize("streaming", [False, True])
def test_preferences_survive_a_resume(data, tmp_path, streaming):
    more = [VOTES, "training.optimizer_steps=3", "training.checkpoint_every=1"]
    more += ["training.keep_checkpoints=9", f"data.streaming={str(streaming).lower()}"]
    train.run(run(data, tmp_path / "run", *more))
    before, rows = trained(tmp_path / "run", 3), figures(tmp_path / "run")
    train.run(run(data, tmp_path / "run", *more), resume=tmp_path / "run/checkpoint-1")
    assert equal(before, trained(tmp_path / "run", 3))
    assert [row["preference"] for row in figures(tmp_path / "run")] == pytest.approx([2 / 3] * 3)
    assert len(rows) == 3


@pytest.mark.slow
@pytest.mark.parametrize("encoded", [False, True])
def test_what_was_computed_without_votes_serves_a_run_with_them(data, tmp_path, encoded):
    """Neither values of the reference nor encodings depend on how sure a pair is."""
    more = ["data.visits=2", "data.flip=false"]
    values = [*more, f"reference_cache={tmp_path / 'values'}"]
    encodings = [*more, f"encodings_cache={tmp_path / 'encodings'}"]
    if encoded:
        use = [*encodings, "model.encoders=cached"]
        precompute.run(run(data, tmp_path / "before", *encodings))
    else:
        use = [*values, "reference=cached"]
        precompute.run(run(data, tmp_path / "before", *values))
    forget_accelerate()
    train.run(run(data, tmp_path / "live", VOTES, *more))
    train.run(run(data, tmp_path / "known", VOTES, *use))
    rows, live = figures(tmp_path / "known"), figures(tmp_path / "live")
    assert [row["preference"] for row in rows] == pytest.approx([2 / 3] * 2)
    losses = [[row["loss"] for row in of] for of in (rows, live)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_an_objective_that_cannot_read_it_is_refused(data, tmp_path):
    for more, message in (
        (
            ["objective={kind: kto, beta: 10}", VOTES],
            r"data\.strength\.preference is votes, and the objective kto does not read the "
            r"preference of a pair: it takes every pair as decided and alike",
        ),
        (
            ["objective={kind: simpo, beta: 2, gamma: 0}", "data.strength.margin={labels: 1.0}"],
            r"data\.strength\.margin is of labels, and the objective simpo does not read the "
            r"margin of a pair: it reads preference and weight alone",
        ),
        (["objective={kind: kto, beta: 10}", "data.ties=keep"], r"data\.ties is keep, and the obj"),
    ):
        with pytest.raises(ConfigError, match=message):
            train.run(run(data, tmp_path / "run", *more), dry_run=True)


PLAYGROUND = SMOKE.parents[1] / "playground"


def test_rounds_whose_objective_cannot_read_their_preferences_are_refused(tmp_path):
    for name, message in (
        ("objective={kind: kto, beta: 1}", r"rollouts\.temperature is 0\.5, and the objective kto"),
        ("objective={kind: margin_regression, beta: 1}", "temperature is 0.5, and the objective m"),
    ):
        run = config.load(RunConfig, PLAYGROUND / "d3po.yaml", ["rollouts.temperature=0.5", name])
        with pytest.raises(ConfigError, match=message):
            check(run)
    given = ["objective={kind: margin_regression, beta: 1}"]
    with pytest.raises(ConfigError, match="needs a target of each pair, and rollouts gives none"):
        check(config.load(RunConfig, PLAYGROUND / "d3po.yaml", given))


def test_labels_are_not_taken_from_two_places(tmp_path):
    more = ["likelihood.relabel={kind: jpeg}", VOTES]
    run = config.load(RunConfig, PLAYGROUND / "spm.yaml", more)
    with pytest.raises(ConfigError, match=r"preference is votes, and likelihood\.relabel labels"):
        check(run)


RESPONSES = """
output: unset
model: {kind: vlm, path: unset, lora: {rank: 2}}
responses: {path: unset, workers: 0}
likelihood: {kind: tokens}
objective: {kind: dpo, beta: 0.1}
optimizer: {lr: 1.0e-2}
training: {optimizer_steps: 2, samples_per_device: 2, log_every: 1}
"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """Four pairs of responses with the votes for either."""
    folder = tmp_path_factory.mktemp("responses")
    solid_image((200, 0, 0)).save(folder / "0.png")
    row = {"image": "0.png", "prompt": "What is it?", "chosen": "a red cat", "rejected": "a dog"}
    rows = [row | {"votes_chosen": 3, "votes_rejected": 1} for _ in range(4)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_votes_of_responses_reach_the_step(scored, tmp_path):
    (tmp_path / "run.yaml").write_text(RESPONSES)
    model = tiny_llava(tmp_path / "llava")
    votes = "responses.strength.preference={kind: votes}"
    methods = {
        "plain": [],
        "dpo": [votes],
        "orpo": [votes, "objective={kind: orpo}"],
        "mpo": [
            votes,
            "objective={kind: weighted_sum, terms: [{objective: {kind: dpo, beta: 0.1}}, "
            "{objective: {kind: bco_pair, beta: 0.1}}, {objective: {kind: sft}}]}",
        ],
    }
    weights = {}
    for name, more in methods.items():
        settings = [f"output={tmp_path / name}", f"model.path={model}", f"responses.path={scored}"]
        run = config.load(RunConfig, tmp_path / "run.yaml", [*settings, *more])
        weights[name] = load_file(train.run(run) / "adapter_model.safetensors")
        rows = figures(tmp_path / name)
        said = [v for row in rows for k, v in row.items() if k.split("/")[-1] == "preference"]
        assert said == pytest.approx([2 / 3] * len(said))
        assert bool(said) == (name != "plain")
    assert not equal(weights["plain"], weights["dpo"])


def test_an_objective_that_cannot_read_it_is_refused_for_responses_too(scored, tmp_path):
    (tmp_path / "run.yaml").write_text(RESPONSES)
    settings = [f"output={tmp_path / 'run'}", f"responses.path={scored}", "model.path=unset"]
    votes = "responses.strength.preference={kind: votes}"
    chip = "objective={kind: chip_released, beta: 0.1}"
    run = config.load(RunConfig, tmp_path / "run.yaml", [*settings, votes, chip])
    with pytest.raises(
        ConfigError, match=r"responses\.strength\.preference is votes.*chip_released"
    ):
        check(run)
