"""Runs on responses about images: what goes together, and the first step of one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console

from diffalign import config
from diffalign.data.batches import TokenBatch
from diffalign.data.source import AbstractSource
from diffalign.errors import ConfigError, DataError
from diffalign.training import build
from diffalign.training.checks import check
from diffalign.training.config import RunConfig
from diffalign.training.identity import identity
from tests.responses import random_image
from tests.runs import figures
from tests.tiny_vlm import tiny_llava

RUN = """
output: {folder}/run
model: {{kind: vlm, path: {folder}/llava, lora: {{rank: 2}}}}
responses:
  path: {folder}/pairs.jsonl
  workers: 0
  conditions: {{crop: {{kind: crop}}, diffuse: {{kind: diffuse}}}}
likelihood: {{kind: tokens, gains: {{gain: {{condition: diffuse}}}}}}
objective:
  kind: weighted_sum
  terms:
    - objective: {{kind: dpo, beta: 0.1}}
    - {{objective: {{kind: dpo, beta: 0.1}}, views: {{rejected: chosen@crop}}}}
    - objective: {{kind: anchor, beta: 0.1}}
optimizer: {{lr: 1.0e-3}}
training: {{optimizer_steps: 2, samples_per_device: 2, log_every: 1}}
"""
DPO = "objective={kind: dpo, beta: 0.1}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    tiny_llava(folder / "llava")
    rows = []
    for number in range(4):
        random_image(number, size=(20, 12)).save(folder / f"{number}.png")
        turn = {"role": "user", "content": "<image>What is it?"}
        responses = {"chosen": f"a red cat {number}", "rejected": "no table"}
        sides = {k: [{"role": "assistant", "content": text}] for k, text in responses.items()}
        rows.append({"images": [f"{number}.png"], "prompt": [turn], **sides})
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "run.yaml").write_text(RUN.format(folder=folder))
    return folder


def run_of(folder: Path, *overrides: str) -> RunConfig:
    return config.load(RunConfig, folder / "run.yaml", list(overrides))


def losses(run: RunConfig) -> list[float]:
    check(run)
    run.output.mkdir(parents=True)
    console = Console(quiet=True)
    source = build.build_source(run, console, skipped=None)
    trainer = build.build_trainer(run, build.build_accelerator(run), source, console)
    assert trainer.fit()
    trainer.export(run.output / "final")
    return [row["loss"] for row in figures(run.output)]


def test_mdpo_starts_at_three_times_the_logarithm_of_two_and_learns(folder, tmp_path):
    first, second = losses(run_of(folder, f"output={tmp_path / 'run'}"))
    assert first == pytest.approx(3 * math.log(2), abs=1e-6)
    assert second < first
    assert (tmp_path / "run/final/adapter_model.safetensors").is_file()


def test_weights_that_the_likelihood_makes_are_served_without_the_data_knowing(folder, tmp_path):
    views = "views: {chosen: 'chosen:gain', rejected: own}"
    term = f"{{objective: {{kind: dpo, beta: 0.1}}, {views}}}"
    objective = f"objective={{kind: weighted_sum, terms: [{term}]}}"
    first, second = losses(run_of(folder, objective, f"output={tmp_path / 'run'}"))
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert second < first


def test_responses_and_images_in_one_run_are_refused(folder):
    with pytest.raises(ConfigError, match=r"there is a section data as well"):
        check(run_of(folder, "data={path: x, resolution: 64}"))


def test_a_likelihood_of_images_is_refused(folder):
    with pytest.raises(
        ConfigError, match=r"responses gives TokenBatch.*denoising takes ImageBatch"
    ):
        check(run_of(folder, "likelihood={kind: denoising}", DPO))


def test_a_divergence_must_be_asked_for(folder):
    objective = "objective={kind: tdpo, beta: 0.1}"
    with pytest.raises(ConfigError, match=r"set likelihood\.divergence to true"):
        check(run_of(folder, objective))
    check(run_of(folder, objective, "likelihood={kind: tokens, divergence: true}"))


def test_a_policy_gradient_takes_responses_that_were_sampled(folder):
    with pytest.raises(ConfigError, match=r"take rollouts that sample groups of responses"):
        check(run_of(folder, "objective={kind: grpo}"))


def test_a_policy_gradient_learns_from_advantages(folder, tmp_path):
    """Chosen responses of the data, in place of sampled ones that did well."""
    tokens = "likelihood={kind: tokens, each_token: true}"
    steps = "training={optimizer_steps: 3, samples_per_device: 2, accumulation: 2, log_every: 1}"
    grpo = "objective={kind: grpo, beta: 0.04}"
    run = run_of(folder, grpo, tokens, steps, f"output={tmp_path / 'run'}")
    run.output.mkdir(parents=True)
    console = Console(quiet=True)
    data = build.build_source(run_of(folder, DPO, tokens, steps), console, skipped=None)
    accelerator = build.build_accelerator(run)
    assert build.build_trainer(run, accelerator, Sampled(data), console).fit()
    first, _, last = figures(run.output)
    assert first["loss"] == pytest.approx(-1, abs=1e-6)  # minus the mean advantage
    assert first["kl"] == pytest.approx(0, abs=1e-6) and last["kl"] > 1e-4
    assert first["ratio"] == last["ratio"] == pytest.approx(1)
    assert last["log_prob/sampled"] > first["log_prob/sampled"]


class Sampled(AbstractSource):
    """The chosen responses of a source, as rollouts give responses."""

    batch_type: ClassVar[type] = TokenBatch
    views = frozenset({"sampled"})

    def __init__(self, source: AbstractSource) -> None:
        self.source = source

    def __iter__(self) -> Iterator[TokenBatch]:
        for batch in self.source:
            yield replace(
                batch,
                views=self.views,
                responses={"sampled": batch.responses["chosen"]},
                strength={"advantage": torch.ones(len(batch))},
            )

    def describe(self) -> list[str]:
        return []

    def describe_end(self) -> list[str]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state)

    @property
    def skipped_counts(self) -> dict[str, int]:
        return {}


def test_a_response_that_the_data_does_not_have_is_refused(folder):
    term = "{objective: {kind: dpo, beta: 0.1}, views: {rejected: revised}}"
    run = run_of(folder, f"objective={{kind: weighted_sum, terms: [{term}]}}")
    check(run)
    with pytest.raises(DataError, match=r"the objective needs revised for its view"):
        build.build_source(run, Console(quiet=True), skipped=None)


def test_where_the_responses_lie_and_how_many_workers_read_them_is_no_part_of_the_run(folder):
    ours = identity(run_of(folder))
    assert identity(run_of(folder, "responses.workers=1", "responses.path=moved")) == ours
    assert identity(run_of(folder, "responses.max_length=99")) != ours


@pytest.mark.parametrize("tower", ["frozen", "trained"])
def test_processes_wait_for_no_gradient_of_a_towers_last_layer_which_nothing_reads(folder, tower):
    run = run_of(folder, "model.lora=null", f"model.tower={tower}")
    waits = build.build_accelerator(run).ddp_handler
    assert waits.find_unused_parameters == (tower == "trained")


def test_a_pair_beyond_the_context_of_the_model_is_skipped(folder, tmp_path):
    short = tmp_path / "llava"
    shutil.copytree(folder / "llava", short)
    content = json.loads((short / "config.json").read_text())
    content["text_config"]["max_position_embeddings"] = 20
    (short / "config.json").write_text(json.dumps(content))
    run = run_of(folder, f"model.path={short}")
    source = build.build_source(run, Console(quiet=True), skipped=tmp_path / "skipped.jsonl")
    with pytest.raises(DataError, match="row above max_length"):
        next(iter(source))
    assert "allowed are 20" in (tmp_path / "skipped.jsonl").read_text()
