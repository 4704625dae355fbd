from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.errors import ModelError
from diffalign.models.noising import Epsilon, StraightPath, Velocity, noising_from_scheduler

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
}
ALL_TIMES = torch.arange(1000, dtype=torch.float64)


def latents(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn((rows, 4, 2, 2), generator=generator)
    return clean, torch.randn((rows, 4, 2, 2), generator=generator)


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0, 0.99915),
        (1, 0.9982960278),
        (51, 0.9505243219),
        (451, 0.3455582161),
        (501, 0.2749990669),
        (951, 0.0081550046),
        (999, 0.0046600985),
    ],
)
def test_stable_diffusion_keeps_the_published_share_of_the_image(t, expected):
    noising = noising_from_scheduler(STABLE_DIFFUSION)

    assert noising.alphas_cumprod[t].item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_corruption_and_velocity_are_those_of_diffusers(beta_schedule, zero_snr):
    config = {
        **STABLE_DIFFUSION,
        "beta_schedule": beta_schedule,
        "rescale_betas_zero_snr": zero_snr,
        "prediction_type": "v_prediction",
    }
    oracle = DDPMScheduler(
        beta_schedule=beta_schedule,
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=zero_snr,
    )
    noising = noising_from_scheduler(config)
    clean, noise = latents(1000)
    steps = ALL_TIMES.long()

    assert isinstance(noising, Velocity)
    torch.testing.assert_close(
        noising.corrupt(clean, noise, ALL_TIMES), oracle.add_noise(clean, noise, steps)
    )
    torch.testing.assert_close(
        noising.target(clean, noise, ALL_TIMES), oracle.get_velocity(clean, noise, steps)
    )


def test_at_zero_terminal_snr_the_last_input_is_pure_noise_and_its_velocity_minus_the_image():
    config = {
        **STABLE_DIFFUSION,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    }
    noising = noising_from_scheduler(config)
    clean, noise = latents(1)
    last = torch.tensor([999.5], dtype=torch.float64)

    assert torch.equal(noising.corrupt(clean, noise, last), noise)
    assert torch.equal(noising.target(clean, noise, last), -clean)


def test_the_straight_path_is_that_of_diffusers():
    oracle = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noising = noising_from_scheduler(dict(oracle.config) | {"_class_name": type(oracle).__name__})
    clean, noise = latents(1000)
    times = oracle.timesteps

    torch.testing.assert_close(
        noising.corrupt(clean, noise, times.double()), oracle.scale_noise(clean, times, noise)
    )
    assert torch.equal(noising.target(clean, noise, times), noise - clean)


def test_straight_path_worked_by_hand():
    noising = StraightPath(schedule_length=1000)
    clean, noise = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    quarter = torch.tensor([250.0], dtype=torch.float64)

    assert torch.equal(noising.corrupt(clean, noise, quarter), torch.full_like(clean, 0.25))
    assert torch.equal(noising.target(clean, noise, quarter), noise)
    assert noising.network_time(quarter).tolist() == [250.0]


def test_epsilon_asks_for_the_noise_itself():
    noising = noising_from_scheduler(STABLE_DIFFUSION)
    clean, noise = latents(2)

    assert isinstance(noising, Epsilon)
    assert torch.equal(noising.target(clean, noise, ALL_TIMES[:2]), noise)


def test_a_discrete_schedule_takes_the_integer_part_of_a_time():
    noising = noising_from_scheduler(STABLE_DIFFUSION)
    clean, noise = latents(2)
    between = torch.tensor([7.0, 7.999], dtype=torch.float64)
    exact = torch.tensor([7.0, 7.0], dtype=torch.float64)

    assert noising.network_time(between).tolist() == [7, 7]
    assert torch.equal(noising.corrupt(clean, noise, between), noising.corrupt(clean, noise, exact))


def test_the_dtype_is_that_of_the_image():
    noising = noising_from_scheduler({**STABLE_DIFFUSION, "prediction_type": "v_prediction"})
    clean, noise = (part.bfloat16() for part in latents(2))

    assert noising.corrupt(clean, noise, ALL_TIMES[:2]).dtype == torch.bfloat16
    assert noising.target(clean, noise, ALL_TIMES[:2]).dtype == torch.bfloat16


def test_noise_that_would_broadcast_is_refused():
    noising = noising_from_scheduler(STABLE_DIFFUSION)
    clean, noise = latents(2)

    with pytest.raises(ValueError, match=r"clean \(2, 4, 2, 2\), noise \(1, 4, 2, 2\)"):
        noising.corrupt(clean, noise[:1], ALL_TIMES[:2])


def test_the_length_is_read_from_the_models_own_config():
    noising = noising_from_scheduler({**STABLE_DIFFUSION, "num_train_timesteps": 500})

    assert noising.schedule_length == 500


def test_a_given_prediction_type_replaces_the_one_in_the_file():
    noising = noising_from_scheduler(STABLE_DIFFUSION, prediction_type="v_prediction")

    assert isinstance(noising, Velocity)


def test_an_unknown_prediction_type_is_refused_naming_the_known_ones():
    config = {**STABLE_DIFFUSION, "prediction_type": "sample"}

    with pytest.raises(ModelError, match=r"'sample' \(supported: epsilon, v_prediction\)"):
        noising_from_scheduler(config)


def test_another_preconditioning_is_refused():
    with pytest.raises(ModelError, match="EDMEulerScheduler, whose preconditioning is not"):
        noising_from_scheduler({"_class_name": "EDMEulerScheduler"})
