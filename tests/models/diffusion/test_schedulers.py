from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffalign.errors import ConfigError, ModelError
from diffalign.generation.models import ModelSpec, locate_model
from diffalign.generation.text_to_image import SamplerConfig, TextToImage
from diffalign.models.diffusion.noising import noising_from_scheduler
from diffalign.models.diffusion.schedulers import (
    MODEL_FIELDS,
    SCHEDULERS,
    build_scheduler,
    model_schedule,
    with_defaults,
)
from diffalign.models.locate import locate
from diffalign.playground.oracle import PlaygroundOracle

EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
KINDS = [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
PLAYGROUND = Path(__file__).parents[3] / "assets" / "playground" / "sdxl"


def sampled_by_a_perfect_model(config: dict, name: str | None, *, steps: int = 20) -> Tensor:
    """Where a scheduler ends if the network knows that all latents are 3: shape [1, 1, 2, 2]."""
    scheduler = build_scheduler(config, name)
    scheduler.set_timesteps(steps)
    shares = noising_from_scheduler(config).alphas_cumprod
    latents = torch.randn((1, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    latents = latents * scheduler.init_noise_sigma
    generator = torch.Generator().manual_seed(1)
    for time in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, time).double()
        below, part = int(time), float(time) - int(time)
        share = (1 - part) * shares[below] + part * shares[min(below + 1, 999)]
        alpha, sigma = share.sqrt(), (1 - share).sqrt()
        noise = (given - alpha * 3) / sigma
        wanted = noise if config["prediction_type"] == "epsilon" else alpha * noise - sigma * 3
        options = {"generator": generator} if "generator" in step_arguments(scheduler) else {}
        latents = scheduler.step(wanted.float(), time, latents, **options).prev_sample
    return latents


def step_arguments(scheduler) -> tuple[str, ...]:
    return type(scheduler).step.__code__.co_varnames


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("prediction_type", "zero_snr"), KINDS)
def test_every_scheduler_finds_latents_beyond_one_if_the_network_knows_them(
    name, prediction_type, zero_snr
):
    config = {**EULER, "prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    try:
        found = sampled_by_a_perfect_model(config, name)
    except ConfigError as error:
        assert zero_snr, error  # some know no zero terminal SNR, and say so
        assert "these can: DDIM" in str(error)
        return
    torch.testing.assert_close(found, torch.full_like(found, 3.0), atol=0.2, rtol=0)


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep", "LCM"])
def test_zero_terminal_snr_is_followed_by_the_usual_ones(name):
    config = {**EULER, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}

    assert build_scheduler(config, name).alphas_cumprod[-1] < 1e-6


@pytest.mark.parametrize("own", SCHEDULERS)
def test_what_a_config_leaves_out_is_what_its_own_class_has(own):
    scheduler = getattr(diffusers, f"{own}Scheduler")()
    noising = noising_from_scheduler({"_class_name": f"{own}Scheduler"})

    torch.testing.assert_close(noising.alphas_cumprod.float(), scheduler.alphas_cumprod)
    assert noising.timestep_spacing == scheduler.config.get("timestep_spacing", "leading")
    for name in ("DDIM", "EulerDiscrete", "HeunDiscrete"):  # whose own defaults differ
        other = build_scheduler({"_class_name": f"{own}Scheduler"}, name)
        torch.testing.assert_close(other.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("own", ["DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "TCD"])
@pytest.mark.parametrize("said", [{}, {"clip_sample": True, "thresholding": True}])
@pytest.mark.parametrize("name", [None, "DDIM", "DDPM", "UniPCMultistep"])
def test_latents_are_never_clipped(own, said, name):
    config = build_scheduler({**EULER, "_class_name": f"{own}Scheduler", **said}, name).config

    assert not config.get("clip_sample", False)
    assert not config.get("thresholding", False)


def test_a_schedule_that_the_models_own_class_lacks_is_sampled_by_ddim():
    config = {**EULER, "_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True}

    assert type(build_scheduler(config)).__name__ == "DDIMScheduler"
    with pytest.raises(ConfigError, match=r"PNDM cannot follow .*these can: DDIM"):
        build_scheduler(config, "PNDM")


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
        {"trained_betas": [0.001 * (1 + n / 500) for n in range(500)], "num_train_timesteps": 500},
    ],
)
def test_other_schedules_are_the_same_in_training_and_in_sampling(changes):
    config = {**EULER, **changes}
    expected = DDPMScheduler(**{name: config[name] for name in MODEL_FIELDS if name in config})

    noising, sampler = noising_from_scheduler(config), build_scheduler(config)

    torch.testing.assert_close(noising.alphas_cumprod.float(), expected.alphas_cumprod)
    torch.testing.assert_close(sampler.alphas_cumprod, expected.alphas_cumprod)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "preconditioning is not"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "preconditioning is not supported"),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "CogVideoXDDIMScheduler, which is not supp"),
        ({"_class_name": "UnCLIPScheduler"}, "UnCLIPScheduler, which is not supported"),
        ({"_class_name": None}, "is of None, which is not supported"),
        ({"prediction_type": "sample"}, "prediction_type 'sample'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "straight path"),
        ({"timestep_type": "continuous"}, "told noise levels in place of timesteps"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "predict a variance"),
        ({"timestep_spacing": "even"}, "timestep_spacing 'even'"),
        ({"steps_offset": -1}, "steps_offset -1"),
        ({"beta_schedule": "cubic"}, "describes no noise schedule .*'cubic'"),
        ({"beta_end": 2.0}, "every beta must lie from 0 to 1"),
        ({"beta_start": "small"}, "describes no noise schedule"),
        ({"trained_betas": [0.1, 0.2]}, "num_train_timesteps 1000, and trained_betas of length 2"),
        ({"num_train_timesteps": 0}, "no noise schedule"),
    ],
)
def test_what_a_scheduler_asks_for_and_training_lacks_is_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        noising_from_scheduler({**EULER, **changes})


@pytest.mark.parametrize(
    "name", ["DPMSolverSDE", "FlowMatchEulerDiscrete", "EDMEuler", "DDIMInverse"]
)
def test_samplers_of_other_models_are_refused(name):
    with pytest.raises(ConfigError, match=f"'{name}' is no sampler for this model"):
        build_scheduler(EULER, name)


def test_a_model_of_another_kind_is_sampled_within_its_own_family():
    config = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}

    assert type(build_scheduler(config)).__name__ == "EDMEulerScheduler"
    assert build_scheduler(config, "EDMDPMSolverMultistep").config.sigma_data == 0.5
    with pytest.raises(ConfigError, match="'DDIM' is no sampler for this model"):
        build_scheduler(config, "DDIM")


def test_settings_stand_above_the_file(tiny_sd15):
    location = locate(str(tiny_sd15))

    schedule = model_schedule(location, prediction_type="v_prediction", zero_terminal_snr=True)

    assert schedule["prediction_type"] == "v_prediction"
    assert with_defaults(schedule)["rescale_betas_zero_snr"] is True
    assert noising_from_scheduler(schedule).alphas_cumprod[-1] == 0


def test_settings_of_another_kind_of_model_are_refused(tiny_sd15, tmp_path):
    folder = Path(shutil.copytree(tiny_sd15, tmp_path / "model"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"}))

    with pytest.raises(ModelError, match="rescale_betas_zero_snr cannot be set for a model whose"):
        model_schedule(locate(str(folder)), zero_terminal_snr=True)


def test_every_scheduler_samples_what_the_playground_was_asked_for():
    """Clipped latents earned 0.05 where the model's own scheduler earns 0.87."""
    prompts = ["a red square", "a blue circle", "a green cross", "a yellow triangle"]
    seeds = [0] * len(prompts)
    model = locate_model(ModelSpec(path=str(PLAYGROUND)))
    opened = TextToImage.open(
        model, SamplerConfig(steps=12), device=torch.device("cpu"), dtype=torch.float32
    )
    usual = opened.generate(prompts, seeds)
    fidelity = {"own": PlaygroundOracle().score(usual, prompts).mean().item()}
    distance = {}
    for name in SCHEDULERS:
        opened.scheduler = model.settings.scheduler(name)
        images = opened.generate(prompts, seeds)
        fidelity[name] = PlaygroundOracle().score(images, prompts).mean().item()
        distance[name] = (images - usual).abs().mean().item()

    assert fidelity["own"] > 0.7
    assert min(fidelity.values()) > 0.5, fidelity
    assert max(distance.values()) < 0.25, distance  # of 2, from black to white
    assert distance["DDIM"] < 0.01, distance
