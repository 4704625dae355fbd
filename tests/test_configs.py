"""Every file under configs/ loads, and says which values it takes from where."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from diffalign import config
from diffalign.generation.prompts import read_prompts
from diffalign.models.base import ReferenceKind
from diffalign.rollouts.d3po import WholeImage
from diffalign.training.config import RunConfig
from diffalign.training.describe import plan
from diffalign.training.reference import resolve_reference

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if path.parent.name != "synthesis"  # not runs of training: tests/jobs/test_synthesise.py
]


def test_there_are_configs():
    assert len(FILES) >= 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_config_loads_and_is_explained(path):
    run = config.load(RunConfig, path)
    assert resolve_reference(run) in {*get_args(ReferenceKind), "cached"}
    assert {"model", "objective", "batch"} <= {heading for heading, _ in plan(run, 1)}
    head = path.read_text().split("output:")[0]
    assert f"diffalign train {path.relative_to(ROOT)}" in head or "scripts/demo.sh" in head


@pytest.mark.parametrize(("name", "pairs"), [("sdxl", 2048), ("sd15", 2048)])
def test_the_launchers_batch_is_reached_with_eight_devices(name, pairs):
    training = config.load(RunConfig, ROOT / f"configs/diffusion_dpo/{name}.yaml").training
    assert training.samples_per_device * training.accumulation * 8 == pairs


@pytest.mark.parametrize("backbone", ["sdxl", "sd15"])
def test_the_beta_of_mapo_is_not_called_one_of_dpo(backbone):
    lines = dict(plan(config.load(RunConfig, ROOT / f"configs/mapo/{backbone}.yaml"), 8))
    assert lines["objective"] == "mapo, beta 0.1"
    assert "Salesforce beta_dpo 500" in lines["loss"]
    assert lines["reference"] == "none"
    assert lines["batch"].startswith("128 samples per step")


@pytest.mark.parametrize("backbone", ["sdxl", "sd15"])
def test_d3po_brings_the_45_animals_of_its_authors(backbone):
    rollouts = config.load(RunConfig, ROOT / f"configs/d3po/{backbone}.yaml").rollouts
    assert isinstance(rollouts, WholeImage) and isinstance(rollouts.prompts, Path)
    assert len(read_prompts(ROOT / rollouts.prompts)) == 45
