"""Every job that writes refuses a place in use, before it loads anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from diffalign import config
from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.errors import BusyError
from diffalign.generation.prompts import PromptsConfig
from diffalign.jobs import compare, evaluate, generate, precompute, score, synthesise
from diffalign.models.vlm.config import VLM
from diffalign.processes import only_writer
from diffalign.scorers.jpeg import JPEG
from diffalign.training.config import RunConfig

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Benchmark(AbstractBenchmark):
    verdicts: Path | None = None

    @property
    def kept(self) -> tuple[Path, ...]:
        return () if self.verdicts is None else (self.verdicts,)

    def plan(self) -> str:
        return ""

    def report(self):
        raise AssertionError("it was not refused")


def run_generate(folder: Path) -> None:
    prompts = PromptsConfig(texts=("a cat",))
    generate.run(generate.GenerateConfig(models={"a": "none"}, prompts=prompts, output=folder))


def run_score(folder: Path) -> None:
    score.run(score.ScoreConfig(images=folder, scorer=JPEG()))


def run_compare(folder: Path) -> None:
    images = folder.parent / "images"
    images.mkdir()
    compare.run(compare.CompareConfig(images=images, output=folder))


def run_evaluate(folder: Path) -> None:
    evaluate.run(Benchmark(details=folder / "details.jsonl"))


def run_evaluate_by_a_judge(folder: Path) -> None:
    evaluate.run(Benchmark(verdicts=folder / "verdicts.jsonl"))


def run_synthesise(folder: Path) -> None:
    path = ROOT / "configs/synthesis/mia_dpo.yaml"
    synthesise.run(config.load(synthesise.SynthesiseConfig, path, [f"output={folder}"]))


def run_precompute(folder: Path) -> None:
    path = ROOT / "configs/playground/responses/dpo.yaml"
    precompute.run(config.load(RunConfig, path, [f"reference_cache={folder}"]))


@pytest.mark.parametrize(
    ("job", "below", "of"),
    [
        (run_generate, "", ""),
        (run_score, "scores", "jpeg"),
        (run_compare, "", "compare"),
        (run_evaluate, "", "details.jsonl"),
        (run_evaluate_by_a_judge, "", "verdicts.jsonl"),
        (run_synthesise, "", ""),
        (run_precompute, "", ""),
    ],
)
def test_a_place_in_use_is_refused(tmp_path, monkeypatch, job, below, of):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(VLM, "check", lambda self: None)
    folder = tmp_path / "out"
    with only_writer(folder / below, of=of), pytest.raises(BusyError, match=r"is in use: "):
        job(folder)
