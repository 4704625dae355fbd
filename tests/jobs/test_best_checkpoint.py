"""Which checkpoint to use, whole: a run, its images, the name of one, and the next command."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffalign import cli, config
from diffalign.errors import ConfigError
from diffalign.jobs import best_checkpoint, train
from diffalign.training.config import RunConfig
from tests import layouts
from tests.runs import forget_accelerate

SMOKE = Path(__file__).parents[2] / "configs/smoke/diffusion_dpo_sdxl.yaml"
PROMPTS = "prompts.texts=[a red thing, a blue thing]"
SCORER = "scorer.kind=tests.comparison.brightness"


@pytest.fixture(scope="module", params=["null", "{rank: 2}"])
def run(request, tiny_sdxl, tmp_path_factory) -> Path:
    """A run of three checkpoints, of all weights or of an adapter."""
    output = tmp_path_factory.mktemp("runs") / "mine"
    data = layouts.write_pickapic(tmp_path_factory.mktemp("data"), layouts.make_pairs(4))
    settings = [f"model.path={tiny_sdxl}", f"data.path={data}", f"output={output}"]
    settings += [f"model.lora={request.param}", "data.resolution=32", "optimizer.lr=1e-2"]
    settings += ["training.optimizer_steps=3", "training.checkpoint_every=1"]
    settings += ["training.keep_checkpoints=10"]
    train.run(config.load(RunConfig, SMOKE, settings))
    forget_accelerate()
    return output


def load(run: Path, *more: str) -> best_checkpoint.BestCheckpointConfig:
    settings = [f"run={run}", PROMPTS, SCORER, "sampler.steps=2", "seeds=2", *more]
    return config.load(best_checkpoint.BestCheckpointConfig, None, settings)


@pytest.mark.slow
def test_one_is_named_with_curve_page_figures_and_a_command_that_works(run, monkeypatch, capsys):
    best, everyone = best_checkpoint.run(load(run))
    assert best in everyone and len(everyone) == 3
    said = capsys.readouterr().out
    found = json.loads((run / "checkpoints/checkpoints.json").read_text())
    assert [row["step"] for row in found["checkpoints"]] == [1, 2, 3]
    rates = {row["step"]: row["win_rate"] for row in found["checkpoints"]}
    assert rates[found["step"]] == max(rates.values()) and found["step"] == best.step
    drifts = [row["drift"] for row in found["checkpoints"]]
    assert all(drift > 0 for drift in drifts)
    assert f"Use the checkpoint of step {best.step}" in said
    with Image.open(run / "checkpoints/curve.png") as curve:
        assert curve.width > 500
    page = (run / "checkpoints/checkpoints.html").read_text()
    assert "win rate over drift" in page and f"step {best.step} (use this one)" in page

    command = said.rstrip().rpartition("Next:\n")[2].strip()
    assert command == found["next"]
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert any((run / "export").iterdir())

    best_checkpoint.run(load(run))  # all is there already
    assert "step-3: 0 to generate, 4 already there" in capsys.readouterr().out
    dark = "watch.dark={kind: tests.comparison.brightness, scale: -1.0}"
    two = ["steps=[1, 2]", f"output={run / 'two'}", "prompts.limit=2"]
    chosen, _ = best_checkpoint.run(load(run, *two, dark))
    told = json.loads((run / "two/compare.json").read_text())["comparisons"]
    assert {row["scorer"] for row in told} == {"brightness", "dark"}
    assert chosen.step in (1, 2)


def test_a_watched_scorer_needs_a_name_of_its_own(tmp_path):
    with pytest.raises(ConfigError, match="watch names a scorer brightness, which is the name of"):
        load(tmp_path, "watch.brightness={kind: jpeg}")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"is not the folder of a training run .*give the `output`"
    ):
        best_checkpoint.run(load(tmp_path))


def write_run(folder: Path, kind: str, steps: tuple[int, ...]) -> Path:
    """A run as far as it is looked at before anything is generated."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(f"model: {{kind: {kind}, path: somewhere}}")
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}/state.json").write_text("{}")
    return folder


def test_a_run_with_one_checkpoint_is_refused_with_the_setting_that_keeps_more(tmp_path):
    run = write_run(tmp_path / "run", "sdxl", (5,))
    with pytest.raises(ConfigError, match=r"nothing to choose from \(.* kept: 5; .*keep_checkpo"):
        best_checkpoint.run(load(run))


def test_a_step_without_a_checkpoint_is_refused(tmp_path):
    run = write_run(tmp_path / "run", "sdxl", (5, 10))
    with pytest.raises(ConfigError, match=r"steps names 7, and .* \(it has 5, 10\)"):
        best_checkpoint.run(load(run, "steps=[5, 7]"))


def test_a_run_on_responses_is_refused_with_what_to_do(tmp_path):
    run = write_run(tmp_path / "run", "vlm", (5, 10))
    with pytest.raises(ConfigError, match=r"compares images\. Evaluate its checkpoints one by one"):
        best_checkpoint.run(load(run))
