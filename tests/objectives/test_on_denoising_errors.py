"""Every loss that has a meaning for denoising errors of pairs trains a denoiser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from diffalign import components, config
from diffalign.errors import ConfigError
from diffalign.objectives.base import AbstractObjective
from diffalign.objectives.dpo import DPO
from diffalign.objectives.sft import SFT
from diffalign.objectives.weighted_sum import Term
from diffalign.training.checks import check
from diffalign.training.config import RunConfig
from tests.objectives.fixtures import denoised_views, normal
from tests.objectives.test_family import OBJECTIVES, build, name_of, target_of

ROOT = Path(__file__).parents[2]
SETTINGS = {
    # In the units of `dpo.py`, where 2000 is a usual beta.
    "f_dpo": {"beta": 1.0, "scale": 2000.0},
    "weighted_sum": {
        "terms": (Term(objective=DPO(beta=2000.0)), Term(objective=SFT(), weight=0.1))
    },
}


def scaled(kind: str, settings: dict[str, object]) -> AbstractObjective:
    beta = {} if kind in ("sft", "weighted_sum") else {"beta": 2000.0}
    return build(kind, {**beta, **settings, **SETTINGS.get(kind, {})})


def applies(kind: str, settings: dict[str, object]) -> bool:
    objective = scaled(kind, settings) if kind in SETTINGS else build(kind, settings)
    return "denoising error" in objective.reads and objective.views <= {"chosen", "rejected"}


FORMS = [form for form in OBJECTIVES if applies(*form)]


NOISE = normal(0, 3, 4, 8, 8).float()
IMAGES = torch.cat([0.5 * normal(1, 3, 4, 8, 8), normal(2, 3, 4, 8, 8)]).float()
"""Chosen ones, and rejected ones under the same noise."""


def predictions(network: torch.nn.Module) -> torch.Tensor:
    """Of the noise in three pairs, under a network of one layer."""
    return network(0.6 * IMAGES + 0.8 * NOISE.repeat(2, 1, 1, 1))


def test_the_family_is_there():
    kinds = {kind for kind, _ in FORMS}
    assert {"ipo", "hinge", "cdpo", "robust", "kto", "nca", "apo", "exo", "sppo"} <= kinds
    assert {"simpo", "cpo", "bco", "bco_pair", "npo", "anchor", "sft", "f_dpo"} <= kinds
    assert not {"orpo", "asft", "tdpo", "v_dpo", "chip_released", "seppo", "clipped_dpo"} & kinds


@pytest.mark.parametrize(("kind", "settings"), FORMS, ids=[name_of(*form) for form in FORMS])
def test_two_steps_lower_the_loss(kind, settings):
    objective = scaled(kind, settings)
    network = torch.nn.Conv2d(4, 4, kernel_size=3, padding=1, bias=False)
    with torch.no_grad():
        network.weight.copy_(0.1 * normal(3, 4, 4, 3, 3))
        reference = predictions(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5)
    losses = []
    for _ in range(3):
        target = NOISE.repeat(2, 1, 1, 1)
        views = denoised_views(predictions(network), reference, target, ("chosen", "rejected"))
        about = normal(4, 3, 8).float()
        views = {side: replace(view, embedding=about) for side, view in views.items()}
        if objective.needs_strength:
            known = {"preference": torch.tensor([0.9, 0.7, 0.6]), "target": target_of(objective, 3)}
            views = {side: replace(view, **known) for side, view in views.items()}
        loss = objective(views).loss.mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("{kind: orpo}", "orpo has a meaning for a token log-probability"),
        ("{kind: dspo, beta: 0.01}", "set likelihood.distance to true"),
        ("{kind: kto, beta: 2000, baseline: mismatched}", "needs chosen, mismatched, rejected"),
        (
            "{kind: weighted_sum, terms: [{objective: {kind: dpo, beta: 2000},"
            " views: {rejected: chosen@crop}}]}",
            "needs chosen, chosen@crop",
        ),
    ],
)
def test_pairs_of_images_refuse_what_they_do_not_have(tiny_sd15, objective, message):
    smoke = ROOT / "configs/smoke/ipo_sdxl.yaml"
    overrides = ["model={kind: sd15, path: X}", f"model.path={tiny_sd15}", f"objective={objective}"]
    with pytest.raises(ConfigError, match=message):
        check(config.load(RunConfig, smoke, overrides))


DPO_RUN, SFT_RUN = "objective={kind: dpo, beta: 2000}", "objective={kind: sft}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([DPO_RUN, "likelihood.mismatched=true"], "the objective does not read that view"),
        (
            [
                "objective={kind: kto, beta: 2000, baseline: mismatched}",
                "likelihood.mismatched=true",
                "training.samples_per_device=1",
            ],
            r"measures each sample next to others \(mismatched\): set it to 2 or more",
        ),
        ([SFT_RUN, "likelihood.inversion={}"], r"set likelihood\.inversion\.by to policy"),
        ([SFT_RUN, "likelihood.snr_bias=0"], "the objective sft lets all count alike"),
        (
            [DPO_RUN, "likelihood={kind: denoising, inversion: {}, timesteps: {high: 500}}"],
            "leave all of timesteps but strata out",
        ),
        (
            ["objective={kind: diffusion_rpo, beta: 2000}"],
            "reads which samples are about the same: set likelihood.embedding to prompts",
        ),
        (
            ["objective={kind: wpo, objective: {kind: dpo, beta: 2000}}"],
            "wpo has a meaning for a token log-probability",
        ),
        (["objective={kind: smpo, beta: 2000}"], "preference"),
        pytest.param(
            [DPO_RUN, "likelihood.inversion={}", "training.sharding=fsdp2", "model.lora=null"],
            "likelihood.inversion runs the network as often as the times of a process ask for",
            marks=pytest.mark.skipif(
                Version(torch.__version__) < Version("2.9"), reason="fsdp2 needs torch 2.9"
            ),
        ),
        ([DPO_RUN, "likelihood.inversion={}", "reference=cached"], "finds? the noise of an image"),
        ([DPO_RUN, "likelihood.distance=true", "reference=cached"], "compares predictions"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tiny_sd15, settings, message):
    smoke = ROOT / "configs/smoke/ipo_sdxl.yaml"
    model = ["model={kind: sd15, path: X, lora: {rank: 2}}", f"model.path={tiny_sd15}"]
    with pytest.raises(ConfigError, match=message):
        check(config.load(RunConfig, smoke, [*model, *settings]))


@pytest.mark.parametrize("name", ["hinge", "ipo", "kto", "margin_regression", "weighted_sum"])
def test_the_smoke_configs_name_their_objective(name):
    run = config.load(RunConfig, ROOT / f"configs/smoke/{name}_sdxl.yaml")
    assert components.kind_of(run.objective) == name
    check(run)
