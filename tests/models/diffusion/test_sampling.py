"""A loaded diffusion model that is sampled from: modes, guidance, sizes, and what it counts."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings

CPU = torch.device("cpu")
TRAININGS = [
    pytest.param(LoraSettings(rank=2, dropout=0.5), "adapter_off", id="lora"),
    pytest.param(LoraSettings(rank=2, dropout=0.5), "past_policy", id="lora_and_past"),
    pytest.param(LoraSettings(rank=2), "frozen_copy", id="lora_and_copy"),
    pytest.param(None, "frozen_copy", id="full"),
    pytest.param(None, "past_policy", id="full_and_past"),
]


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
    conditioning = model.guidance_conditioning(prompts, guidance=guidance)
    return model.guided(noisy, torch.full((len(prompts),), 500), conditioning, guidance=guidance)


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
    monkeypatch.setattr(SDXL, "_read", lambda _: pipeline)
    model = SDXL(path=str(tiny_sdxl)).load(
        device=CPU, compute_dtype=torch.float32, reference="none"
    )
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(["a cat", "fog"])

    rows = model.guidance_conditioning(["a cat", "fog"], guidance=5.0, size=(32, 48))

    torch.testing.assert_close(rows["encoder_hidden_states"], torch.cat([negative, embeds]))
    torch.testing.assert_close(
        rows["added_cond_kwargs"]["text_embeds"], torch.cat([negative_pooled, pooled])
    )
    assert rows["added_cond_kwargs"]["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 4
    assert (negative == 0).all() == zeros


def test_without_guidance_there_are_no_unconditional_rows(make_model):
    model = make_model()
    both = model.guidance_conditioning(["a", "b"], guidance=5.0)["encoder_hidden_states"]

    alone = model.guidance_conditioning(["a", "b"], guidance=1.0)["encoder_hidden_states"]

    assert torch.equal(alone, both[2:])


def test_the_company_of_a_prompt_changes_no_bit_of_its_row(make_model):
    prompts = ["a", "two blue squares", "a", "fog"]

    together = make_model().guidance_conditioning(prompts, guidance=1.0)["encoder_hidden_states"]
    alone = make_model().guidance_conditioning(["fog"], guidance=1.0)["encoder_hidden_states"]

    assert torch.equal(together[3:], alone)
    assert torch.equal(together[0], together[2])


# --- sizes --------------------------------------------------------------------------------------


def test_a_model_knows_its_own_size(make_model):
    model = make_model()

    assert model.image_size == (32, 32)
    assert model.latent_shape_at((32, 32)) == (4, 4, 4)
    assert model.latent_shape_at((64, 16)) == (4, 8, 2)
    assert model.decode_images(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 32, 32)


def test_a_network_that_is_not_square_knows_both_sides(make_model):
    model = make_model()
    model.network.register_to_config(sample_size=(2, 6))

    assert model.image_size == (16, 48)


def test_images_are_cut_to_their_range_unless_asked_otherwise(make_model):
    model = make_model()
    latents = torch.full((1, 4, 4, 4), 50.0)
    raw = model.decode_images(latents, clamp=False)
    assert raw.abs().max() > 1
    assert torch.equal(model.decode_images(latents), raw.clamp(-1, 1))
