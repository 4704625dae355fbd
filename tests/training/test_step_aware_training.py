"""A step-aware preference model trains through the common loop and comes out as a scorer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign import config
from diffalign.errors import ConfigError
from diffalign.jobs import train
from diffalign.scorers.step_aware import StepAware
from diffalign.training.checks import check
from diffalign.training.config import RunConfig
from tests.layouts import make_pairs, pickapic_rows, write_rows
from tests.runs import forget_accelerate
from tests.tiny_clip import write_clip

CONFIG = Path(__file__).parents[2] / "configs/playground/spm.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rows = pickapic_rows(make_pairs(6))
    rows[1] |= {"label_0": 0.5, "label_1": 0.5}
    return write_rows(tmp_path_factory.mktemp("data") / "train.parquet", rows).parent


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def run_of(clip, base, kind, data, output, *more) -> RunConfig:
    overrides = [
        f"model.path={clip}",
        f"model.base={{kind: {kind}, path: {base}}}",
        f"data.path={data}",
        "data.resolution=32",
        "data.workers=0",
        f"output={output}",
        "optimizer.lr=1e-3",
        "optimizer.warmup_steps=0",
        "training.optimizer_steps=2",
        "training.samples_per_device=3",
        *more,
    ]
    return config.load(RunConfig, CONFIG, overrides)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sd15", ("data.weighting=per_prompt",)),
        ("sd15_v", ("model.towers=vision",)),
        ("sdxl", ("training.precision=bf16", "training.ema_decay=0.5")),
        ("sdxl_v", ("likelihood.relabel={kind: pickscore, path: CLIP}",)),
    ],
)
def test_two_steps_change_it_and_what_is_written_scores(request, clip, data, tmp_path, kind, more):
    base = request.getfixturevalue(f"tiny_{kind}")
    more = [override.replace("CLIP", str(clip)) for override in more]
    run = run_of(clip, base, kind.removesuffix("_v"), data, tmp_path / "run", *more)
    final = train.run(run)
    assert final is not None
    state, start = load_file(final / "model.safetensors"), load_file(clip / "model.safetensors")
    moved = {n for n, value in start.items() if not torch.equal(state[f"model.{n}"], value)}
    assert moved
    assert any("text_model" in name for name in moved) == (run.model.towers == "all")
    adaln = [value for name, value in state.items() if "adaLN" in name and "weight" in name]
    assert any(weight.any() for weight in adaln)
    scores = StepAware(path=str(final)).score(
        torch.zeros(2, 3, 32, 32), ["a red thing", "a blue one"], torch.tensor([1, 951])
    )
    assert scores.isfinite().all() and scores.shape == (2,)


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(clip, data, tiny_sd15, tmp_path):
    def trained(output, *more, resume=None):
        forget_accelerate()
        run = run_of(clip, tiny_sd15, "sd15", data, output, "training.optimizer_steps=3", *more)
        return train.run(run, resume=resume)

    whole = trained(
        tmp_path / "whole", "training.checkpoint_every=1", "optimizer.schedule=constant"
    )
    half = tmp_path / "half"
    trained(half, "training.optimizer_steps=1", "optimizer.schedule=constant")
    resumed = trained(half, "optimizer.schedule=constant", resume=half)
    expected, found = (load_file(f / "model.safetensors") for f in (whole, resumed))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.ties=keep", r"data\.ties is keep, .* aot does not read the preference of a pair"),
        ("data.weighting=per_prompt", r"weighting is per_prompt, .* does not read the weight"),
    ],
)
def test_objectives_that_take_decided_pairs_refuse_others(tiny_sdxl, override, message):
    smoke = CONFIG.parents[1] / "smoke/diffusion_dpo_sdxl.yaml"
    more = [f"model.path={tiny_sdxl}", "objective={kind: aot, beta: 500}", override]
    with pytest.raises(ConfigError, match=message):
        check(config.load(RunConfig, smoke, more))


def test_likelihood_and_model_must_fit(clip, tiny_sdxl, data, tmp_path):
    other = ("likelihood={kind: denoising}", "objective={kind: mapo, beta: 1}", "data.ties=drop")
    run = run_of(clip, tiny_sdxl, "sdxl", data, tmp_path, *other)
    with pytest.raises(ConfigError, match="likelihood denoising: denoising measures images under"):
        check(run)


def test_captions_are_never_dropped(clip, tiny_sdxl, data, tmp_path):
    run = run_of(clip, tiny_sdxl, "sdxl", data, tmp_path, "data.caption_dropout=0.2")
    with pytest.raises(ConfigError, match=r"caption_dropout is 0.2.*set it to 0"):
        check(run)
