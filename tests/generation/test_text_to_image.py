from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from diffalign.errors import ConfigError, ModelError
from diffalign.generation import text_to_image
from diffalign.generation.models import ModelSpec, locate_model
from diffalign.generation.text_to_image import (
    SamplerConfig,
    TextToImage,
    check_sampler,
    choose_dtype,
    sampler_settings,
)
from diffalign.models.diffusion.sd15 import SD15
from tests.generation.opened import (
    CPU,
    SEEDS,
    TEXTS,
    change_weights,
    open_model,
    write_adapter,
)

HALF_A_STEP = 0.5 * 2 / 255
"""Of the 256 values of an image file, over a range of -1 to 1."""


@pytest.mark.parametrize(
    ("family", "sampler"),
    [
        ("tiny_sd15", {}),
        ("tiny_sdxl", {}),
        ("tiny_sdxl", {"guidance": 1.0}),
        ("tiny_sdxl", {"scheduler": "DDIM", "eta": 1.0}),
        ("tiny_sdxl", {"scheduler": "EulerAncestralDiscreteScheduler"}),
    ],
)
def test_an_image_does_not_depend_on_its_batch(request, family, sampler):
    opened = open_model(request.getfixturevalue(family), **sampler)
    together = opened.generate(TEXTS, SEEDS)
    assert together.shape == (4, 3, 32, 32)
    assert together.abs().max() <= 1
    alone = [opened.generate([text], [seed])[0] for text, seed in zip(TEXTS, SEEDS, strict=True)]
    reverse = opened.generate(TEXTS[::-1], SEEDS[::-1]).flip(0)
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=0)
    torch.testing.assert_close(together, reverse, atol=1e-4, rtol=0)


@pytest.fixture
def starting_noise(monkeypatch):
    """What a model is given as noise for some prompts and seeds."""

    def of(opened: TextToImage, texts: list[str], seeds: list[int]) -> Tensor:
        given = []
        with monkeypatch.context() as patch:
            patch.setattr(
                text_to_image, "sample", lambda _, noise, *a, **k: given.append(noise) or noise
            )
            opened.generate(texts, seeds)
        return given[0].clone()

    return of


def test_seed_and_prompt_both_change_the_noise(tiny_sdxl, starting_noise):
    noise = starting_noise(open_model(tiny_sdxl), ["a", "a", "b", "a"], [0, 1, 0, 0])
    assert torch.equal(noise[0], noise[3])
    assert (noise[0] - noise[1]).abs().mean() > 0.5
    assert (noise[0] - noise[2]).abs().mean() > 0.5
    assert noise.std() == pytest.approx(1.0, abs=0.15)


def test_every_model_starts_from_the_same_noise(tiny_sdxl, tiny_sd15, tmp_path, starting_noise):
    moved = Path(shutil.copytree(tiny_sdxl, tmp_path / "moved"))
    change_weights(moved)
    first, *others = (
        starting_noise(open_model(path), TEXTS, SEEDS) for path in (tiny_sdxl, tiny_sd15, moved)
    )
    assert all(torch.equal(first, other) for other in others)


PLAIN = [("tiny_sd15", StableDiffusionPipeline), ("tiny_sdxl", StableDiffusionXLPipeline)]


@pytest.mark.parametrize(("family", "pipeline_class"), PLAIN)
@pytest.mark.parametrize(
    "sampler",
    [
        {},
        {"guidance": 1.0},
        {"guidance": 0.0},
        {"negative_prompt": "ugly"},
        {"height": 48, "width": 32},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_those_of_the_plain_pipeline(
    request, family, pipeline_class, sampler, dtype, starting_noise
):
    folder = request.getfixturevalue(family)
    settings = SamplerConfig(steps=2, **sampler)
    model = locate_model(ModelSpec(path=str(folder)))
    opened = TextToImage.open(model, settings, device=CPU, dtype=dtype)
    plain = pipeline_class.from_pretrained(folder, torch_dtype=dtype)
    negative = sampler.get("negative_prompt")
    expected = plain(
        prompt=TEXTS,
        latents=starting_noise(opened, TEXTS, SEEDS),
        num_inference_steps=2,
        guidance_scale=sampler.get("guidance", 5.0),
        negative_prompt=None if negative is None else [negative] * len(TEXTS),
        height=sampler.get("height"),
        width=sampler.get("width"),
        output_type="pt",
    ).images
    # Measured: 4e-6 in float32; in bfloat16 the pipeline also rounds what it decodes.
    within = 1e-4 if dtype == torch.float32 else HALF_A_STEP + 2**-8
    torch.testing.assert_close(
        opened.generate(TEXTS, SEEDS), 2 * expected.float() - 1, atol=within, rtol=0
    )


@pytest.fixture
def told_guidance(tiny_sd15, tmp_path) -> Path:
    """An SD 1.5 that was distilled to be told the guidance, as latent consistency models are."""
    folder = Path(shutil.copytree(tiny_sd15, tmp_path / "lcm"))
    unet = UNet2DConditionModel.from_pretrained(tiny_sd15, subfolder="unet")
    torch.manual_seed(0)
    told = UNet2DConditionModel.from_config({**unet.config, "time_cond_proj_dim": 16})
    told.load_state_dict(unet.state_dict(), strict=False)
    told.save_pretrained(folder / "unet")
    for name, scheduler in (("model_index.json", ["diffusers", "LCMScheduler"]),):
        index = json.loads((folder / name).read_text())
        index |= {"_class_name": "LatentConsistencyModelPipeline", "scheduler": scheduler}
        (folder / name).write_text(json.dumps(index))
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "_class_name": "LCMScheduler"}))
    return folder


def test_a_network_that_is_told_the_guidance_is_sampled_from_and_not_trained(
    told_guidance, starting_noise
):
    opened = open_model(told_guidance, guidance=4.0)
    pipeline = LatentConsistencyModelPipeline.from_pretrained(told_guidance, safety_checker=None)
    generators = [
        text_to_image.cpu_generator(text_to_image.derive_seed("picture", text, seed))
        for text, seed in zip(TEXTS, SEEDS, strict=True)
    ]
    for generator in generators:
        torch.randn((4, 4, 4), generator=generator)  # the starting noise comes first
    expected = pipeline(
        prompt=TEXTS,
        latents=starting_noise(opened, TEXTS, SEEDS),
        generator=generators,
        num_inference_steps=2,
        guidance_scale=4.0,
        output_type="pt",
    ).images

    generated = opened.generate(TEXTS, SEEDS)

    torch.testing.assert_close(generated, 2 * expected - 1, atol=1e-4, rtol=0)
    stronger = open_model(told_guidance, guidance=8.0).generate(TEXTS, SEEDS)
    assert (stronger - generated).abs().max() > 1e-3
    with pytest.raises(ModelError, match="training does not tell it"):
        SD15(path=str(told_guidance)).check()


def test_each_prompt_is_encoded_once(tiny_sdxl):
    opened = open_model(tiny_sdxl)
    encoded = []
    conditioner = type(opened.model.prompts.conditioner)
    real = conditioner.encode

    def spy(self, prompts):
        encoded.extend(prompts)
        return real(self, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conditioner, "encode", spy)
        opened.generate(["a", "a"], [0, 1])
        opened.generate(["a", "b"], [2, 0])
        opened.generate(["b", "b"], [1, 2])
    assert sorted(encoded) == ["", "a", "b"]


def test_a_model_in_training_is_sampled_from_as_its_result_will_be(tiny_sdxl):
    opened = open_model(tiny_sdxl)
    settings = locate_model(ModelSpec(path=str(tiny_sdxl))).settings
    model = settings.load(device=CPU, compute_dtype=torch.float32, reference="frozen_copy")
    with model.sampling():
        images = TextToImage(model, settings.scheduler(), opened.sampler).generate(TEXTS, SEEDS)
    torch.testing.assert_close(images, opened.generate(TEXTS, SEEDS), atol=1e-5, rtol=0)
    # What was kept of the prompts serves training afterwards.
    predicted = model.denoiser(TEXTS, guidance=5.0)(torch.ones(4, 4, 4, 4), torch.full((4,), 500))
    predicted.square().mean().backward()


def test_a_named_scheduler_keeps_the_models_own_noise_schedule(tiny_sdxl):
    own = open_model(tiny_sdxl).scheduler
    other = open_model(tiny_sdxl, scheduler="DPMSolverMultistep").scheduler
    assert isinstance(other, diffusers.DPMSolverMultistepScheduler)
    assert other.config.beta_end == own.config.beta_end


def test_an_unknown_scheduler_is_refused_with_the_nearest(tiny_sdxl):
    with pytest.raises(
        ConfigError, match=r"'EulerDescrete' is no sampler .* Did you mean EulerDiscrete\?"
    ):
        open_model(tiny_sdxl, scheduler="EulerDescrete")


@pytest.mark.parametrize(
    ("fields", "sampler", "message"),
    [
        ({"sample_size": None}, {}, "has no sample_size, .* give height and width"),
        ({"sample_size": None}, {"height": 32}, "has no sample_size"),
        ({"sample_size": None}, {"height": 32, "width": 48}, None),
        ({"patch_size": 2}, {"height": 40, "width": 48}, "40x48 pixels .* multiples of 16"),
    ],
)
def test_a_size_that_cannot_be_is_refused_before_weights(
    tiny_sd15, tmp_path, fields, sampler, message
):
    folder = Path(shutil.copytree(tiny_sd15, tmp_path / "model"))
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    model, settings = locate_model(ModelSpec(path=str(folder))), SamplerConfig(**sampler)
    if message is None:
        check_sampler(model, settings)
        return
    with pytest.raises(ConfigError, match=message):
        check_sampler(model, settings)


def test_in_half_precision_an_adapter_stays_separate(tiny_sdxl, tmp_path):
    adapter = write_adapter(tiny_sdxl, tmp_path / "adapter")
    model = locate_model(ModelSpec(path=str(tiny_sdxl), lora=adapter))
    opened = TextToImage.open(model, SamplerConfig(steps=1), device=CPU, dtype=torch.bfloat16)
    assert any("lora_A" in name for name, _ in opened.model.network.named_parameters())
    assert opened.generate(["a"], [0]).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"eta": 2.0}, "eta must be between 0 and 1"),
        ({"height": 500}, "height must be a multiple of 8 pixels, got 500"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**arguments)


def test_settings_say_the_precision_that_was_chosen():
    dtype = choose_dtype("auto", CPU)
    assert sampler_settings(SamplerConfig(), dtype)["dtype"] == "float32"
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16
    assert sampler_settings(SamplerConfig(), choose_dtype("bf16", CPU))["dtype"] == "bf16"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["tiny_sd15", "tiny_sdxl"])
def test_a_gpu_in_half_precision_generates_the_same_images(request, family):
    folder, cuda = request.getfixturevalue(family), torch.device("cuda")
    sampler = SamplerConfig(steps=2, scheduler="DDIM", eta=1.0)
    model = locate_model(ModelSpec(path=str(folder)))
    generated = TextToImage.open(model, sampler, device=cuda, dtype=torch.float16).generate(
        TEXTS, SEEDS
    )
    expected = open_model(folder, scheduler="DDIM", eta=1.0).generate(TEXTS, SEEDS)
    torch.testing.assert_close(generated, expected, atol=0.05, rtol=0)
