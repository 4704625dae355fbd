"""Which rung of the ladder a preset takes, with a count that the test makes up."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign import config
from diffalign.errors import ConfigError
from diffalign.training import checks, presets
from diffalign.training.config import RunConfig
from diffalign.training.memory_plan import CONTEXT, GIB, MemoryPlan, Target
from diffalign.training.step_memory import StepMemory
from tests.runs import run_script

MODEL = Path(__file__).parents[2] / "assets/playground/sdxl"
CONFIG = """
output: runs/x
preset: 12gb
model: {kind: sdxl, path: assets/playground/sdxl, lora: {rank: 4}}
data: {path: assets/playground/preferences, resolution: 64}
likelihood: {kind: denoising}
objective: {kind: dpo, beta: 2000}
optimizer: {lr: 1e-4}
training: {optimizer_steps: 2, accumulation: 12}
"""


def counted(run: RunConfig, target: Target) -> MemoryPlan:
    """GiB: 5 that stay, 3 of encoders, half of one where they come and go, and for each sample 8,
    or 2 checkpointed; half of one more for larger images."""
    model = run.model
    each = 2 if model.gradient_checkpointing else 8
    size = 5 + each * run.training.samples_per_device + (run.data.resolution > 64) / 2
    size += {"resident": 3, "offload": 0.5, "cached": 0}[model.encoders]
    parts = {"activations": int(size * GIB / 1.05) - CONTEXT}
    return MemoryPlan(target=target, step=StepMemory(phases={"policy": parts}, work={}))


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    monkeypatch.setattr(presets, "memory_plan", counted)


def chosen(tmp_path: Path, *overrides: str) -> tuple[RunConfig, str]:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    run, choice = presets.load(path, overrides)
    assert choice is not None
    return run, choice.describe()


@pytest.mark.parametrize(
    ("card", "checkpointing", "encoders", "samples", "accumulation"),
    [
        ("48gb", False, "resident", 4, 3),  # 8 + 8 n: 4 of 12 at once, as 12 has no 5
        ("16gb", True, "resident", 3, 4),  # 8 + 2 n; one sample without checkpointing takes 16
        ("12gb", True, "resident", 1, 12),
        ("8gb", True, "offload", 1, 12),
        ("8gb data.resolution=128", True, "cached", 1, 12),
    ],
)
def test_the_fastest_settings_that_fit_are_taken(
    tmp_path, card, checkpointing, encoders, samples, accumulation
):
    run, _ = chosen(tmp_path, *f"preset={card}".split())
    assert run.model.gradient_checkpointing is checkpointing
    assert run.model.encoders == encoders
    assert run.training.samples_per_device == samples
    assert run.training.accumulation == accumulation
    assert run.training.precision == "bf16"


def test_what_the_config_says_stays(tmp_path):
    run, said = chosen(
        tmp_path, "training.precision=float32", "model.gradient_checkpointing=true", "preset=24gb"
    )
    assert run.training.precision == "float32"
    assert "precision" not in said and "checkpointing" not in said
    assert run.training.samples_per_device * run.training.accumulation == 12


def test_a_run_that_was_chosen_is_the_same_when_it_is_loaded_again(tmp_path):
    run, _ = chosen(tmp_path)
    config.save(run, tmp_path / "saved.yaml")
    again, choice = presets.load(tmp_path / "saved.yaml")
    assert choice is None and again == run and again.preset is None


def test_a_card_that_cannot_hold_the_run_is_refused_with_one_that_can(tmp_path):
    with pytest.raises(ConfigError, match=r"takes 28\.\d GiB .* preset 48gb would fit"):
        chosen(tmp_path, "training.samples_per_device=10", "model.encoders=resident")


@pytest.mark.slow
def test_the_table_of_the_docs_can_be_made(capsys, monkeypatch):
    monkeypatch.undo()  # the count itself
    run_script("plan_table.py", "8gb:lora", "--folder", MODEL, "--resolution", "64")
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("| 8gb | lora | 0.0") and "gradient_checkpointing=false" in line


def test_a_preset_that_was_not_resolved_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    with pytest.raises(ConfigError, match="nothing was chosen for it"):
        checks.check(config.load(RunConfig, path))
