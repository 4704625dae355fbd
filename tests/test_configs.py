"""Every file under configs/ loads, and says which values it takes from where."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign import config
from diffalign.training.build import RunConfig, plan, resolve_reference

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


def test_there_are_configs():
    assert len(FILES) >= 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_config_loads_and_is_explained(path):
    run = config.load(RunConfig, path)
    assert resolve_reference(run) in ("adapter_off", "frozen_copy", "none")
    assert {"model", "objective", "batch"} <= {heading for heading, _ in plan(run, 1)}
    head = path.read_text().split("output:")[0]
    assert f"diffalign train {path.relative_to(ROOT)}" in head or "scripts/demo.sh" in head


@pytest.mark.parametrize(("name", "pairs"), [("sdxl", 2048), ("sd15", 2048)])
def test_the_launchers_batch_is_reached_with_eight_devices(name, pairs):
    training = config.load(RunConfig, ROOT / f"configs/diffusion_dpo/{name}.yaml").training
    assert training.samples_per_device * training.accumulation * 8 == pairs
