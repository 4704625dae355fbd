"""Every config of the playground trains as it is shipped, two steps of few pairs.

Only counts are lowered; what a config needs first (pairs of its own, groups that somebody ranked, a
preference model, a first stage) is made by the commands that its head or docs/results.md names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffalign import config
from diffalign.jobs import generate, precompute, score, train
from diffalign.playground.oracle import PlaygroundOracle
from diffalign.playground.scenes import preference_prompts
from diffalign.training.config import RunConfig
from tests.runs import figures, forget_accelerate, run_script

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/playground"
FILES = sorted(CONFIGS.rglob("*.yaml"))
FEWER = (
    "optimizer.warmup_steps=0",
    "training.optimizer_steps=2",
    "training.samples_per_device=2",
    "training.checkpoint_every=2",
    "training.log_every=1",
)
FEWER_BY_CONFIG = {
    "d3po": ("rollouts.prompts_per_round=4",),
    "d3po_jpeg": ("rollouts.prompts_per_round=4",),
    "reward_clip": ("data.holdout=null",),
    "reward_vlm": ("data.holdout=null",),
    "responses/reward": ("responses.holdout=null",),
    "seppo": ("rollouts.updates_per_round=1",),
    "spo": ("rollouts.prompts_per_round=4",),
    "text_d3po": ("rollouts.prompts_per_round=4",),
}


def train_briefly(name: str, output: Path, *more: str) -> Path:
    forget_accelerate()
    path = CONFIGS / f"{name}.yaml"
    fewer = (*FEWER, *FEWER_BY_CONFIG.get(name, ()), f"output={output}", *more)
    train.run(config.load(RunConfig, path, list(fewer)))
    return output


@pytest.fixture(scope="module", autouse=True)
def from_the_repository() -> Iterator[None]:
    """Where the paths of the configs begin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield
    forget_accelerate()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "pairs"
    few = ("--images", 4, "--prompts", 4, "--inference-steps", 4)
    run_script("make_playground_preferences.py", "--out", folder, *few)
    return folder


@pytest.fixture(scope="module")
def spm(tmp_path_factory, pairs) -> Path:
    return train_briefly("spm", tmp_path_factory.mktemp("made") / "spm", f"data.path={pairs}")


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "groups"
    overrides = [
        "models.base=assets/playground/sdxl",
        f"prompts.texts={preference_prompts()[:2]}",
        "trajectories.process.steps=10",
        "trajectories.process.guidance=2",
        f"output={folder}",
    ]
    generate.run(config.load(generate.GenerateConfig, None, overrides))
    run_script("annotate_playground.py", folder)
    return folder


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> Path:
    return train_briefly("responses/opa_dpo_stage1", tmp_path_factory.mktemp("made") / "stage1")


@pytest.fixture(scope="module")
def oracle_scores(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "scores"
    data = score.DataToScore(path="assets/playground/preferences")
    score.run(score.ScoreConfig(data=data, scorer=PlaygroundOracle(), output=folder))
    return folder / "oracle.parquet"


@pytest.fixture(scope="module")
def encodings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "encodings"
    fewer = ["data.limit=8", f"encodings_cache={folder}"]
    forget_accelerate()
    precompute.run(config.load(RunConfig, CONFIGS / "diffusion_dpo_cached.yaml", fewer))
    return folder


NEEDS = {
    "diffusion_dpo_cached": ("encodings", "data.limit=8", "encodings_cache={made}"),
    "score_tags": ("oracle_scores", "data.scores.columns.oracle.file={made}"),
    "spm": ("pairs", "data.path={made}"),
    "spo": ("spm", "rollouts.scorer.path={made}/final"),
    "d3po_feedback": (
        "groups",
        "rollouts.trajectories={made}",
        "rollouts.preferences={made}/preferences.jsonl",
    ),
    "responses/opa_dpo": ("stage1", "model.lora.start={made}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [str(path.relative_to(CONFIGS).with_suffix("")) for path in FILES])
def test_a_playground_config_trains_two_steps(name, request, tmp_path):
    fixture, *overrides = NEEDS.get(name, (None,))
    made = request.getfixturevalue(fixture) if fixture else None
    replaced = [override.format(made=made) for override in overrides]
    rows = figures(train_briefly(name, tmp_path / "run", *replaced))
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


def test_what_the_preference_model_sees_through_noise_is_measured(spm, capsys):
    pairs = ("--pairs", "assets/playground/preferences", "--limit", 8)
    run_script("step_accuracy.py", spm / "final", *pairs)
    assert "| step-aware minus plain: " in capsys.readouterr().out
