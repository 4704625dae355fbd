from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.errors import ModelError
from diffalign.models.diffusion.noising import (
    Epsilon,
    StraightPath,
    Velocity,
    noising_from_scheduler,
)

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


def test_the_straight_path_has_published_values():
    # Computed in float64 by others: noisy latents, velocity, and the way back from a prediction.
    def normal(seed):
        return torch.from_numpy(np.random.RandomState(seed).standard_normal((2, 4, 8, 8)))

    noising, t = StraightPath(schedule_length=1000), torch.tensor([300.0, 800.0]).double()
    clean, noise = normal(40), normal(41)
    noisy, target = noising.corrupt(clean, noise, t), noising.target(clean, noise, t)
    prediction = target + 0.2 * normal(43)
    image, their_noise = noising.separate(noisy, prediction, t)

    def first(values):
        return values[:, 0, 0, 0].tolist()

    def errors(values, wanted):
        return (values - wanted).square().flatten(start_dim=1).mean(dim=1).tolist()

    near = functools.partial(pytest.approx, abs=1e-11)
    assert first(noisy) == near([-0.506497084968, 0.013094991653])
    assert first(target) == near([0.336835374144, -0.423518427827])
    assert first(image) == near([-0.622991692732, 0.546171787790])
    assert first(their_noise) == near([-0.234676333519, -0.120174207382])
    assert errors(image, clean) == near([0.003506713167, 0.026882869941])
    assert errors(their_noise, noise) == near([0.019092105023, 0.001680179371])
    assert torch.equal(noising.denoised(noisy, prediction, t), image)


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


# --- the way back -------------------------------------------------------------------------------

EXACT = Epsilon(
    schedule_length=1000,
    alphas_cumprod=torch.cumprod(
        1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0
    ),
)


def spaced(spacing, offset=0):
    return noising_from_scheduler(
        {**STABLE_DIFFUSION, "timestep_spacing": spacing, "steps_offset": offset}
    )


@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50, 1000])
@pytest.mark.parametrize(
    ("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
)
def test_steps_leave_from_the_times_of_diffusers_and_arrive_where_the_next_leaves(
    spacing, offset, steps
):
    oracle = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    oracle.set_timesteps(steps)

    pairs = spaced(spacing, offset).reverse_times(steps)

    assert [t for t, _ in pairs] == oracle.timesteps.tolist()
    assert [t_next for _, t_next in pairs] == [*oracle.timesteps.tolist()[1:], 0]


def test_published_steps():
    pairs = spaced("leading", 1).reverse_times(20)

    assert pairs[:2] == [(951, 901), (901, 851)]
    assert pairs[-2:] == [(51, 1), (1, 0)]


def test_rounding_adds_no_time_below_zero():
    assert spaced("trailing").reverse_times(61)[-1] == (15, 0)


def test_a_config_without_spacing_is_read_as_diffusers_reads_it():
    noising = noising_from_scheduler(STABLE_DIFFUSION)

    assert (noising.timestep_spacing, noising.steps_offset) == ("leading", 0)


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (1, 0.0206483202),
        (51, 0.0405967319),
        (101, 0.1672946639),
        (501, 0.4293211493),
        (951, 0.6443910140),
    ],
)
def test_published_standard_deviations(t, expected):
    here, there = torch.tensor([t]), torch.tensor([max(t - 50, 0)])

    assert EXACT.reverse_std(here, there, eta=1.0).item() == pytest.approx(expected, abs=1e-10)
    assert EXACT.reverse_std(here, there, eta=0.5).item() == pytest.approx(expected / 2, abs=1e-10)


def test_a_step_to_where_it_left_from_is_certain():
    assert EXACT.reverse_std(torch.tensor([0, 7]), torch.tensor([0, 7]), eta=1.0).tolist() == [0, 0]


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 1), ("trailing", 0)])
@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True)],
)
def test_every_step_is_that_of_diffusers(prediction_type, zero_snr, spacing, offset, eta):
    config = {
        **STABLE_DIFFUSION,
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": zero_snr,
        "timestep_spacing": spacing,
        "steps_offset": offset,
    }
    oracle = DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=False)
    oracle.set_timesteps(20)
    oracle.alphas_cumprod = oracle.alphas_cumprod.double()  # in float32 its own rounding shows
    oracle.final_alpha_cumprod = oracle.alphas_cumprod[0]
    noising = noising_from_scheduler(config)
    noisy, prediction = (part.double() for part in latents(20))
    pairs = noising.reverse_times(20)
    t, t_next = torch.tensor(pairs).unbind(dim=1)

    mean, std = noising.transition(noisy, prediction, t, t_next, eta=eta)
    denoised = noising.denoised(noisy, prediction, t)

    assert (pairs[0][0] == 999) == (spacing == "trailing")  # no image at all at zero SNR
    for row, (at, _) in enumerate(pairs):
        one, noise = slice(row, row + 1), torch.ones(1, 4, 2, 2).double()
        still, moved = (
            oracle.step(prediction[one], at, noisy[one], eta=eta, variance_noise=share * noise)
            for share in (0.0, 1.0)
        )
        torch.testing.assert_close(mean[one], still.prev_sample, rtol=0, atol=1e-7)
        torch.testing.assert_close(denoised[one], still.pred_original_sample, rtol=0, atol=1e-7)
        step_std = (moved.prev_sample - still.prev_sample).mean()
        torch.testing.assert_close(std[row], step_std, rtol=0, atol=1e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_the_image_and_the_noise_back(prediction_type):
    noising = noising_from_scheduler(STABLE_DIFFUSION, prediction_type=prediction_type)
    clean, noise = (part.double() for part in latents(1000))
    noisy, target = (f(clean, noise, ALL_TIMES) for f in (noising.corrupt, noising.target))

    image, found = noising.separate(noisy, target, ALL_TIMES)

    torch.testing.assert_close(image, clean, rtol=0, atol=1e-10)
    torch.testing.assert_close(found, noise, rtol=0, atol=1e-10)
    assert torch.equal(noising.denoised(noisy, target, ALL_TIMES), image)


def test_both_predictions_of_one_belief_step_alike():
    epsilon, velocity = (
        noising_from_scheduler(STABLE_DIFFUSION, prediction_type=kind)
        for kind in ("epsilon", "v_prediction")
    )
    clean, noise = (part.double() for part in latents(2))
    t, t_next = torch.tensor([501, 51]), torch.tensor([451, 1])
    noisy = epsilon.corrupt(clean, noise, t)

    steps = [
        noising.transition(noisy, noising.target(clean, noise, t), t, t_next, eta=1.0)
        for noising in (epsilon, velocity)
    ]

    for ours, theirs in zip(*steps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_with_a_perfect_prediction_steps_keep_the_noise_level():
    clean, noise = torch.zeros(1, 1, 400, 400), torch.ones(1, 1, 400, 400).double()
    t, t_next = torch.tensor([501]), torch.tensor([451])

    mean, std = EXACT.transition(EXACT.corrupt(clean.double(), noise, t), noise, t, t_next, eta=0.7)

    level = mean.mean() ** 2 + std.item() ** 2  # of the old noise, and of the new
    assert level.item() == pytest.approx(1 - EXACT.alphas_cumprod[451].item(), abs=1e-12)


@pytest.mark.parametrize(
    ("noisy", "prediction", "expected"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
def test_steps_are_taken_in_float32_or_better(noisy, prediction, expected):
    t, t_next = torch.tensor([501]), torch.tensor([451])
    left, right = (part.to(d) for part, d in zip(latents(1), (noisy, prediction), strict=True))

    mean, std = spaced("leading").transition(left, right, t, t_next, eta=1.0)

    assert mean.dtype == std.dtype == expected


def test_a_prediction_that_would_broadcast_is_refused():
    noisy, prediction = latents(2)
    t = torch.tensor([501, 501])

    with pytest.raises(ValueError, match=r"noisy \(2, 4, 2, 2\), prediction \(1, 4, 2, 2\)"):
        spaced("leading").transition(noisy, prediction[:1], t, t - 50, eta=1.0)


def test_rounding_makes_no_mean_of_a_first_step_undefined():
    config = {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    noising = noising_from_scheduler(config, prediction_type="v_prediction")
    firsts = torch.tensor([noising.reverse_times(steps)[0] for steps in range(1, 200)])
    noisy, prediction = latents(len(firsts))

    mean, _ = noising.transition(noisy, prediction, *firsts.unbind(dim=1), eta=1.0)

    assert torch.isfinite(mean).all()
