"""The sampler on models that know their image, and a loaded model that is sampled from: modes,
guidance, sizes, and what it counts."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from diffalign.models.diffusion.autoencoder import LatentSpace
from diffalign.models.diffusion.noising import noising_from_scheduler
from diffalign.models.diffusion.parts import PipelineParts
from diffalign.models.diffusion.sampling import guidance_embedding, sample, with_guidance
from diffalign.models.diffusion.schedulers import build_scheduler
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings

EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
}
STRAIGHT = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
CPU = torch.device("cpu")
SIZE = (32, 32)
TRAININGS = [
    pytest.param(LoraSettings(rank=2, dropout=0.5), "adapter_off", id="lora"),
    pytest.param(LoraSettings(rank=2, dropout=0.5), "past_policy", id="lora_and_past"),
    pytest.param(LoraSettings(rank=2), "frozen_copy", id="lora_and_copy"),
    pytest.param(None, "frozen_copy", id="full"),
    pytest.param(None, "past_policy", id="full_and_past"),
]


def knowing(image: float, shares):
    """What predicts the noise of latents that are all one number, from shares of the image."""

    def denoise(noisy, time):
        below = time.long().clamp(max=998)
        part = (time.double() - below)[:, None, None, None]
        share = shares[below][:, None, None, None] * (1 - part)
        share = share + part * shares[below + 1][:, None, None, None]
        return ((noisy.double() - share.sqrt() * image) / (1 - share).sqrt()).float()

    return denoise


def start(rows=2):
    return torch.randn((rows, 1, 2, 2), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["EulerDiscrete", "DDIM", "DPMSolverMultistep", "HeunDiscrete"])
def test_a_sampler_arrives_at_the_image_that_the_network_knows(name):
    shares = noising_from_scheduler(EULER).alphas_cumprod

    found = sample(knowing(3.0, shares), start(), build_scheduler(EULER, name), steps=20)

    torch.testing.assert_close(found, torch.full_like(found, 3.0), atol=0.2, rtol=0)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"])
def test_a_straight_path_is_followed_to_its_end(name):
    """Rectified flow: noise minus image, whatever the steps; no scaling at either end."""
    noise, times = start(), []

    def denoise(noisy, time):
        times.append(time.tolist())
        share = (time / 1000)[:, None, None, None]
        return (noisy - 3.0) / share  # (1 - share) * 3 + share * noise, less 3, is this times share

    found = sample(denoise, noise, build_scheduler(STRAIGHT, name), steps=4)

    torch.testing.assert_close(found, torch.full_like(found, 3.0), atol=1e-4, rtol=0)
    assert times[0] == [1000.0, 1000.0]
    # shift 3: 3 s / (1 + 2 s) for s = 0.75 is 0.9, after diffusers' own spacing of s
    assert all(a == b for a, b in times)


def test_what_a_schedule_is_told_arrives_there():
    config = {**STRAIGHT, "use_dynamic_shifting": True, "shift": 1.0}
    times = []

    def denoise(noisy, time):
        times.append(time[0].item())
        return torch.zeros_like(noisy)

    for mu in (0.5, 1.15):
        scheduler = build_scheduler(config)
        sample(denoise, start(), scheduler, steps=2, schedule={"mu": mu})

    assert times[0] == times[2] == 1000.0
    assert times[1] < times[3]  # a larger shift stays longer with the noise
    with pytest.raises(ValueError, match="mu"):
        sample(denoise, start(), build_scheduler(config), steps=2)


def test_a_scheduler_that_adds_noise_takes_each_rows_own():
    def still(noisy, time):
        return torch.zeros_like(noisy)

    def run(seeds, eta):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        scheduler = build_scheduler(EULER, "DDIM")
        return sample(still, start(), scheduler, steps=3, eta=eta, generators=generators)

    both, turned = run([1, 2], 1.0), run([2, 2], 1.0)

    assert torch.equal(both[1], turned[1])
    assert not torch.equal(both[0], turned[0])
    assert torch.equal(run([1, 2], 0.0), run([3, 4], 0.0))
    assert not torch.equal(both, run([1, 2], 0.0))


@pytest.mark.parametrize(("guidance", "expected"), [(3.0, 7.0), (1.5, 2.5), (1.0, 1.0)])
def test_guidance_is_worked_out_by_hand(guidance, expected):
    """Unconditionally -2 + 0, conditionally 1: -2 + g * 3."""
    seen = []

    def denoise(noisy, time):
        seen.append((len(noisy), time.tolist()))
        values = torch.tensor([-2.0, -2.0, 1.0, 1.0][-len(noisy) :])
        return values[:, None, None, None].expand_as(noisy)

    prediction = with_guidance(denoise, guidance)(start(), torch.tensor([7, 8]))

    assert (prediction == expected).all()
    assert prediction.shape == (2, 1, 2, 2)
    assert seen == ([(4, [7, 8, 7, 8])] if guidance > 1 else [(2, [7, 8])])


@pytest.mark.parametrize("guidance", [1.0, 4.0, 7.5])
def test_a_network_is_told_the_guidance_as_its_pipeline_does(guidance):
    scale = torch.tensor([guidance - 1])
    published = StableDiffusionXLPipeline.get_guidance_scale_embedding(None, scale, 256)

    torch.testing.assert_close(guidance_embedding(guidance, 256), published, atol=2e-3, rtol=0)


# --- loaded models ------------------------------------------------------------------------------


@pytest.fixture
def make_model(tiny_sd15):
    def make(lora=None, *, reference="none", dtype=torch.float32):
        settings = SD15(path=str(tiny_sd15), lora=lora)
        return settings.load(device=CPU, compute_dtype=dtype, reference=reference)

    return make


def change(model):
    """Move every trained parameter, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


class Watched(torch.nn.Module):
    """What a wrapper for several processes is to the model: it counts its calls."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def guided(model, prompts=("a cat",), guidance=5.0):
    """A guided prediction of one latent a prompt."""
    noisy = torch.ones(len(prompts), 4, 4, 4)
    denoise = model.denoiser(prompts, guidance=guidance)
    return denoise(noisy, torch.full((len(prompts),), 500))


def modes(network):
    return {name: module.training for name, module in network.named_modules()}


@pytest.mark.parametrize(("lora", "reference"), TRAININGS)
def test_sampling_switches_dropout_and_gradient_off_and_everything_back(
    make_model, lora, reference
):
    model = make_model(lora, reference=reference)
    model.network.mid_block.eval()  # a mode of its own
    before = modes(model.network)

    with model.sampling():
        inside = guided(model)
        assert not any(modes(model.network).values())
    outside = guided(model)

    assert not inside.requires_grad
    assert outside.requires_grad
    assert modes(model.network) == before


def test_sampling_is_undone_after_an_error(make_model):
    model = make_model(LoraSettings(rank=2, dropout=0.5), reference="adapter_off")
    before = modes(model.network)

    with pytest.raises(KeyError), model.reference(), model.sampling():
        raise KeyError

    assert modes(model.network) == before
    assert guided(model).requires_grad


@pytest.mark.parametrize("reference_first", [True, False])
@pytest.mark.parametrize(("lora", "reference"), TRAININGS)
def test_the_reference_is_sampled_within_its_context(make_model, lora, reference, reference_first):
    model = make_model(lora, reference=reference)
    with model.sampling():
        start = guided(model)
    change(model)
    contexts = [model.reference(), model.sampling()]

    with contexts[1 - reference_first], contexts[reference_first]:
        inside = guided(model)
    with model.sampling():
        policy = guided(model)

    assert torch.equal(inside, start)
    assert not torch.equal(policy, start)
    assert guided(model).requires_grad


def test_sampling_calls_the_network_without_its_wrapper(make_model):
    model = make_model(LoraSettings(rank=2), reference="adapter_off")
    model.network = wrapper = Watched(model.network)

    with model.sampling():
        guided(model)
    with model.reference(), model.sampling():
        guided(model)
    with model.sampling():
        with model.reference():
            guided(model)
        with model.sampling():
            guided(model)
        guided(model)
    assert wrapper.calls == 0
    guided(model)
    with model.reference():
        guided(model)
    assert wrapper.calls == 2


def test_evaluations_count_rows_of_policy_and_reference(make_model):
    model = make_model(LoraSettings(rank=2), reference="adapter_off")

    guided(model, ("a", "b"), guidance=1.0)
    assert model.evaluations == 2
    guided(model, ("a", "b"))
    assert model.evaluations == 6
    with model.reference(), model.sampling():
        guided(model)
    assert model.evaluations == 8


# --- guidance -----------------------------------------------------------------------------------


def test_guidance_carries_on_from_the_unconditional_through_the_conditional_prediction(make_model):
    model = make_model()
    with torch.no_grad():
        conditional, other = guided(model, guidance=1.0), guided(model, guidance=3.0)
        unconditional = conditional - (other - conditional) / 2  # 3 c - 2 u - c = 2 (c - u)
        result = guided(model, guidance=5.0)

    torch.testing.assert_close(
        result, unconditional + 5.0 * (conditional - unconditional), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(conditional, unconditional, atol=1e-3)


def test_under_reduced_precision_guidance_is_computed_in_float32(make_model):
    assert guided(make_model(dtype=torch.bfloat16)).dtype == torch.float32
    assert guided(make_model(dtype=torch.bfloat16), guidance=1.0).dtype == torch.float32


@pytest.mark.parametrize("zeros", [True, False])
def test_the_unconditional_rows_of_sdxl_are_those_of_its_pipeline(tiny_sdxl, monkeypatch, zeros):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    monkeypatch.setattr(PipelineParts, "read", lambda *_, **__: pipeline)
    model = SDXL(path=str(tiny_sdxl)).load(
        device=CPU, compute_dtype=torch.float32, reference="none"
    )
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(["a cat", "fog"])

    rows = model.prompts.guided(["a cat", "fog"], guidance=5.0, size=(32, 48))

    torch.testing.assert_close(rows["encoder_hidden_states"], torch.cat([negative, embeds]))
    torch.testing.assert_close(
        rows["added_cond_kwargs"]["text_embeds"], torch.cat([negative_pooled, pooled])
    )
    assert rows["added_cond_kwargs"]["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 4
    assert (negative == 0).all() == zeros


def test_without_guidance_there_are_no_unconditional_rows(make_model):
    model = make_model()
    both = model.prompts.guided(["a", "b"], guidance=5.0, size=SIZE)["encoder_hidden_states"]

    alone = model.prompts.guided(["a", "b"], guidance=1.0, size=SIZE)["encoder_hidden_states"]

    assert torch.equal(alone, both[2:])


def test_the_company_of_a_prompt_changes_no_bit_of_its_row(make_model):
    prompts = ["a", "two blue squares", "a", "fog"]

    together = make_model().prompts.guided(prompts, guidance=1.0, size=SIZE)[
        "encoder_hidden_states"
    ]
    alone = make_model().prompts.guided(["fog"], guidance=1.0, size=SIZE)["encoder_hidden_states"]

    assert torch.equal(together[3:], alone)
    assert torch.equal(together[0], together[2])


# --- sizes --------------------------------------------------------------------------------------


def test_a_model_knows_its_own_size(make_model):
    model = make_model()

    assert model.latent_space.image_size == (32, 32)
    assert model.latent_space.shape() == (4, 4, 4)
    assert model.latent_space.shape((64, 16)) == (4, 8, 2)
    assert model.autoencoder.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 32, 32)


def test_a_network_that_is_not_square_knows_both_sides():
    space = LatentSpace.of({"sample_size": [2, 6], "in_channels": 4}, 8)

    assert space.image_size == (16, 48)
    assert space.shape() == (4, 2, 6)


def test_images_are_cut_to_their_range_unless_asked_otherwise(make_model):
    model = make_model()
    latents = torch.full((1, 4, 4, 4), 50.0)
    raw = model.autoencoder.decode(latents, clamp=False)
    assert raw.abs().max() > 1
    assert torch.equal(model.autoencoder.decode(latents), raw.clamp(-1, 1))
