from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.utils import DistributedType

from diffalign import config
from diffalign.errors import ConfigError
from diffalign.training import build
from diffalign.training.checks import check
from diffalign.training.config import RunConfig
from diffalign.training.describe import plan
from diffalign.training.identity import identity
from diffalign.training.reference import resolve_reference

SMOKE = Path(__file__).parents[2] / "configs/smoke/diffusion_dpo_sdxl.yaml"


def run_of(model: Path, *overrides: str) -> RunConfig:
    return config.load(RunConfig, SMOKE, [f"model.path={model}", *overrides])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), "adapter_off"),
        (("model.lora=null",), "frozen_copy"),
        (("reference=frozen_copy",), "frozen_copy"),
        (("model.lora.start=runs/x",), "past_policy"),
        (("model.lora.start=runs/x", "reference=adapter_off"), "adapter_off"),
    ],
)
def test_the_reference_is_the_cheapest_that_the_training_allows(tiny_sdxl, overrides, expected):
    assert resolve_reference(run_of(tiny_sdxl, *overrides)) == expected


def test_identity_holds_what_shapes_the_weights_and_nothing_else(tiny_sdxl):
    ours = identity(run_of(tiny_sdxl))
    same = identity(run_of(tiny_sdxl, "output=elsewhere", "training.log_every=7", "data.workers=3"))
    assert ours == same
    for override in ("seed=1", "objective.beta=1", "optimizer.lr=1", "data.resolution=128"):
        assert identity(run_of(tiny_sdxl, override)) != ours


def test_a_longer_run_may_continue_a_constant_schedule_but_no_falling_one(tiny_sdxl):
    longer = "training.optimizer_steps=99"
    assert identity(run_of(tiny_sdxl, longer)) == identity(run_of(tiny_sdxl))
    falling = "optimizer.schedule=cosine"
    assert identity(run_of(tiny_sdxl, falling, longer)) != identity(run_of(tiny_sdxl, falling))


def test_timesteps_that_the_model_does_not_have_are_refused(tiny_sdxl):
    with pytest.raises(ConfigError, match=r"likelihood denoising: timesteps reach 1999"):
        check(run_of(tiny_sdxl, "likelihood.timesteps.high=2000"))


TRANSITION = ("likelihood={kind: transition}",)
CLIPPED = "objective={kind: clipped_dpo, beta: 10, clip: 0.1}"
WHOLE_IMAGE = (
    "rollouts={kind: d3po, prompts: {texts: [a fox]}, prompts_per_round: 1, "
    "scorers: [{kind: jpeg}]}",
)
SEMI_POLICY = ("rollouts={kind: seppo}",)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (*TRANSITION, "objective={kind: mapo, beta: 1}"),
            "transition measures a step log-density, and the objective mapo has a meaning for a "
            "denoising error",
        ),
        ((CLIPPED,), "denoising measures a denoising error, and the objective clipped_dpo"),
        (("objective={kind: bradley_terry}",), "the objective bradley_terry has a meaning for a s"),
        (("likelihood={kind: scores}",), "scores measures a score, and the objective dpo has"),
        (TRANSITION, "data gives ImageBatch, and the likelihood transition takes StepBatch"),
        (
            (*WHOLE_IMAGE, "data=null"),
            "rollouts d3po gives StepBatch, and the likelihood denoising takes ImageBatch",
        ),
        (
            SEMI_POLICY,
            "rollouts seppo gives the views chosen, sampled, and the objective dpo needs "
            "chosen, rejected",
        ),
        (
            ("objective={kind: seppo, beta: 1}",),
            "data gives the views chosen, rejected, and the objective seppo needs chosen, sampled",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_weights_are_read(
    tiny_sdxl, overrides, message
):
    run = config.load(RunConfig, SMOKE, [f"model.path={tiny_sdxl}", *overrides])
    with pytest.raises(ConfigError, match=message):
        check(run)


TAGGED = (
    "data.scores={columns: {a: {file: a.parquet, scorer: jpeg}}, "
    "tag: {by: a, caption: '{q} {caption}'}}",
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("likelihood={kind: scores}", "objective={kind: bradley_terry}"),
            "a preference model scores images against the captions of the data: leave tag out",
        ),
        (
            (*SEMI_POLICY, "objective={kind: seppo, beta: 1}"),
            "data.scores.tag tells the scores .* rollouts seppo trains on samples as well",
        ),
        (
            ("model.encoders=cached",),
            "data.scores.tag gives each image of a pair a prompt of its own, where captions are",
        ),
    ],
)
def test_tags_that_nobody_would_read_are_refused(tiny_sdxl, overrides, message):
    run = config.load(RunConfig, SMOKE, [f"model.path={tiny_sdxl}", *TAGGED, *overrides])
    with pytest.raises(ConfigError, match=message):
        check(run)


def test_what_scores_decide_shapes_a_run_and_where_they_lie_does_not(tiny_sdxl):
    ours = identity(run_of(tiny_sdxl, *TAGGED))
    assert identity(run_of(tiny_sdxl, *TAGGED, "data.scores.columns.a.file=b.parquet")) == ours
    for override in ("tag.quantiles=3", "columns.a.scorer=clip", "order={by: a}"):
        assert identity(run_of(tiny_sdxl, *TAGGED, f"data.scores.{override}")) != ours


def test_half_precision_without_a_gpu_is_refused(tiny_sdxl, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="fp16 needs a CUDA device"):
        check(run_of(tiny_sdxl, "training.precision=fp16"))


def test_a_sharded_launch_is_refused(tiny_sdxl, monkeypatch):
    monkeypatch.setattr(
        "accelerate.Accelerator.distributed_type", property(lambda self: DistributedType.FSDP)
    )
    with pytest.raises(ConfigError, match=r"launched for FSDP.*training.sharding=fsdp2"):
        build.build_accelerator(run_of(tiny_sdxl))


def test_the_plan_names_the_batch_with_its_factors_and_the_published_beta(tiny_sdxl):
    lines = dict(plan(run_of(tiny_sdxl, "training.accumulation=3"), 2))
    assert lines["batch"] == "24 samples per step = 4 per device x 3 accumulated x 2 processes"
    assert "Salesforce beta_dpo 2000" in lines["objective"]
