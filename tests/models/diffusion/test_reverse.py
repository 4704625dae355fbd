"""Reverse steps: which settings have a density, and that guidance is the pipeline's own."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.schedulers import scheduling_ddim

from diffalign.models.diffusion.noising import StraightPath, noising_from_scheduler
from diffalign.models.diffusion.parts import PipelineParts
from diffalign.models.diffusion.reverse import ReverseProcess, reverse_step, through_one_step
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings
from diffalign.seeding import noise_from_seeds

CPU = torch.device("cpu")
SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
BACKBONES = {
    "sd15": (SD15, StableDiffusionPipeline),
    "sd15_v": (SD15, StableDiffusionPipeline),
    "sdxl": (SDXL, StableDiffusionXLPipeline),
    "sdxl_v": (SDXL, StableDiffusionXLPipeline),
}


def noise(seed, rows=2):
    return torch.randn((rows, 4, 4, 4), generator=torch.Generator().manual_seed(seed))


def load(folder, settings, **changes):
    return settings(path=str(folder), **changes).load(
        device=CPU, compute_dtype=torch.float32, reference="none"
    )


@pytest.fixture
def model(tiny_sd15):
    return load(tiny_sd15, SD15, lora=LoraSettings(rank=2))


# --- settings -----------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_published_code():
    assert ReverseProcess() == ReverseProcess(steps=20, guidance=5.0, eta=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"guidance": 0.5}, "guidance must be at least 1, got 0.5: 1 is none"),
        ({"eta": -0.5}, r"eta must be between 0 and 1, got -0.5"),
        ({"eta": 1.5}, r"eta must be between 0 and 1, got 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReverseProcess(**settings)


def test_deterministic_steps_can_be_taken_and_have_no_density():
    noising = noising_from_scheduler(SCHEDULE)
    ReverseProcess(eta=0.0).check_steps(noising)
    with pytest.raises(ValueError, match=r"eta must be above 0.*a step without noise has no den"):
        ReverseProcess(eta=0.0).check(noising)


@pytest.mark.parametrize(
    ("spacing", "offset", "refused"),
    [
        ("leading", 1, False),
        ("trailing", 0, False),
        ("leading", 0, True),
        ("linspace", 0, True),
    ],
)
def test_a_last_step_that_goes_nowhere_is_refused(spacing, offset, refused):
    noising = noising_from_scheduler(
        {**SCHEDULE, "timestep_spacing": spacing, "steps_offset": offset}
    )

    if not refused:
        ReverseProcess().check(noising)
        return
    with pytest.raises(
        ValueError,
        match=r"step 20 of 20 goes from timestep 0 to 0 .* set steps_offset to 1 with "
        rf"timestep_spacing leading.*\(they are {offset} and {spacing}\)",
    ):
        ReverseProcess().check(noising)


def test_every_standard_deviation_that_passes_is_above_zero():
    noising = noising_from_scheduler(SCHEDULE)
    for steps in (1, 2, 10, 50, 500):
        process = ReverseProcess(steps=steps, eta=0.1)
        process.check(noising)
        t, t_next = torch.tensor(noising.reverse_times(steps)).unbind(dim=1)
        assert (noising.reverse_std(t, t_next, eta=0.1) > 0).all()


def test_more_steps_than_the_schedule_has_are_refused():
    noising = noising_from_scheduler(SCHEDULE)

    with pytest.raises(ValueError, match="steps is 1001, but the model's schedule has 1000"):
        ReverseProcess(steps=1001).check(noising)
    with pytest.raises(ValueError, match=r"start at timestep 1000, but .* ends at 999: take fewer"):
        ReverseProcess(steps=1000).check(noising)


def test_epsilon_where_there_is_no_image_at_all_is_refused():
    config = {**SCHEDULE, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

    with pytest.raises(ValueError, match="timestep 999 holds no image at all"):
        ReverseProcess().check(noising_from_scheduler(config))
    ReverseProcess().check(noising_from_scheduler(config, prediction_type="v_prediction"))


def test_a_straight_path_is_refused():
    with pytest.raises(ValueError, match="straight path are deterministic and have no density"):
        ReverseProcess().check(StraightPath(schedule_length=1000))


# --- steps --------------------------------------------------------------------------------------


def test_one_time_for_all_rows_is_that_time_for_each(model):
    denoise = model.denoiser(["a", "b"], guidance=5.0)

    one = reverse_step(denoise, model.noising, noise(0), 501, 451, eta=1.0)
    times = torch.tensor([501, 501]), torch.tensor([451, 451])
    each = reverse_step(denoise, model.noising, noise(0), *times, eta=1.0)

    assert torch.equal(one.mean, each.mean)
    assert torch.equal(one.std, each.std)
    assert one.std.shape == (2,)


def test_rows_may_be_at_different_times(model):
    denoise, states = model.denoiser(["a", "b"], guidance=5.0), noise(0)

    times = torch.tensor([951, 51]), torch.tensor([901, 1])
    both = reverse_step(denoise, model.noising, states, *times, eta=1.0)
    alone = model.denoiser(["b"], guidance=5.0)
    second = reverse_step(alone, model.noising, states[1:], 51, 1, eta=1.0)

    torch.testing.assert_close(both.mean[1:], second.mean)
    torch.testing.assert_close(both.denoised[1:], second.denoised)
    assert both.std[1].item() == pytest.approx(0.0405967319, abs=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_step_is_made_of_the_guided_prediction(model, guidance):
    denoise = model.denoiser(["a", "b"], guidance=guidance)
    states, t = noise(0), torch.tensor([501, 501])
    prediction = denoise(states, t)
    mean, std = model.noising.transition(states, prediction, t, t - 50, eta=1.0)

    step = reverse_step(denoise, model.noising, states, 501, 451, eta=1.0)

    assert torch.equal(step.mean, mean)
    assert torch.equal(step.std, std)
    assert torch.equal(step.denoised, model.noising.denoised(states, prediction, t))


def test_gradient_flows_through_both_branches_of_the_guidance(model):
    states, t = noise(0), torch.tensor([501, 501])
    denoise = model.denoiser(["a", "b"], guidance=5.0)
    step = reverse_step(denoise, model.noising, states, 501, 451, eta=1.0)
    step.mean.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.trained_parameters()}
    model.network.zero_grad()

    told = model.prompts.guided(["a", "b"], guidance=5.0, size=(32, 32))
    unconditional, conditional = (
        model.predict(states, t, {"encoder_hidden_states": rows})
        for rows in told["encoder_hidden_states"].chunk(2)
    )
    prediction = -4.0 * unconditional + 5.0 * conditional
    model.noising.transition(states, prediction, t, t - 50, eta=1.0)[0].sum().backward()

    assert any(gradient.norm() > 0 for gradient in gradients.values())
    for name, parameter in model.trained_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


# --- the pipeline's own way ---------------------------------------------------------------------


def pipeline_trajectory(pipeline, prompts, process, start, samples, monkeypatch):
    """What diffusers makes of the same noises."""
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False
    )
    pipeline.set_progress_bar_config(disable=True)
    remaining = iter(samples)
    monkeypatch.setattr(scheduling_ddim, "randn_tensor", lambda *_, **__: next(remaining))
    return pipeline(
        prompts,
        latents=start,
        num_inference_steps=process.steps,
        guidance_scale=process.guidance,
        eta=process.eta,
        output_type="latent",
    ).images


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(
    ("backbone", "zeros"),
    [("sd15", None), ("sd15_v", None), ("sdxl", True), ("sdxl", False), ("sdxl_v", True)],
)
def test_a_trajectory_is_that_of_the_pipeline(backbone, guidance, zeros, request, monkeypatch):
    settings, pipeline_class = BACKBONES[backbone]
    folder = request.getfixturevalue(f"tiny_{backbone}")
    process = ReverseProcess(steps=4, guidance=guidance, eta=0.8)
    prompts = ["a red circle", "two blue squares"]
    samples = [noise(seed) for seed in range(1, 5)]
    pipeline = pipeline_class.from_pretrained(folder)
    if zeros is not None:
        pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
        monkeypatch.setattr(PipelineParts, "read", lambda *_, **__: pipeline)
    expected = pipeline_trajectory(pipeline, prompts, process, noise(0), samples, monkeypatch)

    model = load(folder, settings)
    state = noise(0)
    with model.sampling():
        denoise = model.denoiser(prompts, guidance=guidance)
        times = model.noising.reverse_times(process.steps)
        for sample, (t, t_next) in zip(samples, times, strict=True):
            step = reverse_step(denoise, model.noising, state, t, t_next, eta=process.eta)
            state = step.mean + step.std.reshape(-1, 1, 1, 1) * sample

    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)


# --- half way, predicted clean in one step -------------------------------------------------------


@pytest.fixture(params=["sd15", "sd15_v", "sdxl", "sdxl_v"])
def either(request):
    folder = request.getfixturevalue(f"tiny_{request.param}")
    settings = (SDXL if "sdxl" in request.param else SD15)(path=str(folder))
    return settings.load(device=CPU, compute_dtype=torch.float32, reference="none")


def look(model, batch, *, view="chosen", guidance=5.0, **changes):
    given = {
        "images": batch.images[view],
        "prompts": batch.captions,
        "t": batch.timesteps,
        "noise_seeds": batch.noise_seeds,
        "encoding_seeds": batch.encoding_seeds[view],
        **changes,
    }
    return through_one_step(model, guidance=guidance, **given)


def test_it_is_the_decoded_prediction_of_the_noised_latent(either, make_pairs):
    batch = make_pairs("a", "b")
    seen = look(either, batch, guidance=3.0)
    with torch.no_grad():
        clean = either.autoencoder.encode(batch.images["chosen"], batch.encoding_seeds["chosen"])
        t, noising = batch.timesteps, either.noising
        noise = noise_from_seeds(batch.noise_seeds, tuple(clean.shape[1:]))
        noisy = noising.corrupt(clean, noise, t)
        network = either.network.eval()
        conditioning = either.prompts.guided(batch.captions, guidance=3.0, size=(32, 32))
        doubled = torch.cat([noisy, noisy])
        both = network(doubled, noising.network_time(t).repeat(2), **conditioning).sample
        without, given = both.chunk(2)
        prediction = without + 3.0 * (given - without)
        expected = either.autoencoder.decode(noising.denoised(noisy, prediction, t))
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)
    assert seen.shape == batch.images["chosen"].shape


def test_a_row_does_not_depend_on_its_company(either, make_pairs):
    together, alone = look(either, make_pairs("a", "b")), look(either, make_pairs("b"))
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=0)


def test_equal_images_with_equal_seeds_look_equal(either, make_pairs):
    batch = make_pairs("a")
    image = batch.images["chosen"].repeat(2, 1, 1, 1)
    twice = look(
        either,
        batch,
        images=image,
        prompts=batch.captions * 2,
        t=batch.timesteps.repeat(2),
        noise_seeds=batch.noise_seeds * 2,
        encoding_seeds=batch.encoding_seeds["chosen"] * 2,
    )
    torch.testing.assert_close(twice[0], twice[1], atol=1e-6, rtol=0)


def test_it_leaves_the_model_in_its_mode_and_without_gradients(either, make_pairs):
    either.network.train()
    seen = look(either, make_pairs("a"))
    assert either.network.training
    assert not seen.requires_grad
