"""A benchmark is one folder: nothing outside of it names its kind."""

from __future__ import annotations

import json
import sys

import pytest

import diffalign.benchmarks
from diffalign import cli, components, config
from diffalign.benchmarks.base import AbstractBenchmark

KINDS = components.folder_kinds("diffalign.benchmarks")

CONFIG = """
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.benchmarks.mean_words.rules import words
from diffalign.benchmarks.report import Measure, Report, panel
from diffalign.benchmarks.saved_responses import RESPONSE_KEYS, read_objects, text_of


@dataclass(frozen=True, kw_only=True)
class MeanWords(AbstractBenchmark):
    responses: Path

    @property
    def kept(self):
        return ()

    def plan(self):
        return str(self.responses)

    def report(self):
        rows = enumerate(read_objects(self.responses), start=1)
        texts = [text_of(row, RESPONSE_KEYS, path=self.responses, number=n) for n, row in rows]
        tally = {"words": np.array([float(words(t)) for t in texts]), "n": np.ones(len(texts))}
        mean = Measure("mean length", "words", lambda t: t["words"] / t["n"])
        whole = panel(tally, {"mean_words": mean}, self.bootstrap)
        return Report(benchmark="mean_words", whole=whole, bootstrap=self.bootstrap)
"""
RULES = "def words(text):\n    return len(text.split())\n"


def test_kinds_are_the_folders_and_each_holds_one_benchmark():
    published = {"amber", "chair", "hallusionbench", "mme", "mmhal", "mmstar", "object_halbench"}
    assert {*published, "pope"} <= set(KINDS)
    classes = [components.find(AbstractBenchmark, kind) for kind in KINDS]
    assert [cls.__module__ for cls in classes] == [
        f"diffalign.benchmarks.{k}.config" for k in KINDS
    ]


@pytest.fixture
def new_folder(tmp_path, monkeypatch):
    folder = tmp_path / "mean_words"
    folder.mkdir()
    for name, content in {"__init__": "", "config": CONFIG, "rules": RULES}.items():
        (folder / f"{name}.py").write_text(content)
    places = [*diffalign.benchmarks.__path__, str(tmp_path)]
    monkeypatch.setattr(diffalign.benchmarks, "__path__", places)
    yield tmp_path
    for name in [name for name in sys.modules if ".mean_words" in name]:
        del sys.modules[name]


def test_a_new_folder_is_a_new_benchmark(new_folder, monkeypatch, capsys):
    responses = new_folder / "responses.jsonl"
    responses.write_text("\n".join(json.dumps({"answer": a}) for a in ("A dog.", "A big cat.", "")))
    arguments = ["diffalign", "evaluate", "mean_words", f"responses={responses}", "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)
    assert json.loads(capsys.readouterr().out)["mean_words"] == pytest.approx(5 / 3)
    assert "mean_words" in components.kinds(AbstractBenchmark)


def test_details_and_what_a_rerun_goes_on_from_are_written(tmp_path):
    overrides = [
        "model.kind=tests.judges.brightness_teller",
        *(f"{name}={tmp_path / name}" for name in ("objects", "synonyms", "details")),
        f"asking.images={tmp_path}",
        f"asking.saves={tmp_path / 'kept'}",
    ]
    chair = config.load(components.find(AbstractBenchmark, "chair"), None, overrides)
    assert chair.written == {tmp_path / "details", tmp_path / "kept"}
