"""On tiny models: a run that trained, and what it started from."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

from diffalign import config
from diffalign.errors import ConfigError
from diffalign.imaging.image_files import pixels_of, to_images
from diffalign.jobs import train
from diffalign.scorers.implicit import Implicit
from diffalign.seeding import derive_seed, noise_from_seeds
from diffalign.training.config import RunConfig
from tests import layouts
from tests.runs import forget_accelerate

SMOKE = Path(__file__).parents[2] / "configs/smoke/diffusion_dpo_sdxl.yaml"
PROMPTS = ["a red thing", "a blue thing", "a red thing"]


@pytest.fixture(scope="module")
def base(tiny_sdxl) -> Path:
    return tiny_sdxl


@pytest.fixture(scope="module", params=["null", "{rank: 2}"], ids=["all weights", "adapter"])
def run(request, base, tmp_path_factory) -> Path:
    """A run of two steps, of all weights or of an adapter."""
    output = tmp_path_factory.mktemp("runs") / "mine"
    data = layouts.write_pickapic(tmp_path_factory.mktemp("data"), layouts.make_pairs(4))
    settings = [f"model.path={base}", f"data.path={data}", f"output={output}"]
    settings += [f"model.lora={request.param}", "data.resolution=32", "optimizer.lr=1e-2"]
    settings += ["training.optimizer_steps=2", "training.checkpoint_every=1"]
    settings += ["training.keep_checkpoints=10"]
    train.run(config.load(RunConfig, SMOKE, settings))
    forget_accelerate()
    return output


def images(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand((count, 3, 32, 32), generator=generator) * 2 - 1


def scorer(run: Path, **changes) -> Implicit:
    return Implicit(policy=str(run), **{"beta": 2.0, "timesteps": 3, "noises": 2, **changes})


def errors_by_diffusers(pipeline, timesteps: int, noises: int) -> torch.Tensor:
    """Mean squared error of each image, in float64, by a pipeline and its own scheduler."""
    pixels = torch.stack([pixels_of(image) for image in to_images(images())]).double()
    unet, vae = pipeline.unet.double().eval(), pipeline.vae.double()
    latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, device="cpu", do_classifier_free_guidance=False
    )
    framing = torch.tensor([[32, 32, 0, 0, 32, 32]] * 3)
    told = {"text_embeds": pooled.double(), "time_ids": framing}
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    found = []
    for part in range(timesteps):
        t = torch.full((3,), int((part + 0.5) / timesteps * 1000))
        for number in range(noises):
            seed = derive_seed("implicit reward", part, number)
            noise = noise_from_seeds([seed], tuple(latents.shape[1:])).expand_as(latents).double()
            noisy = scheduler.add_noise(latents, noise, t)
            told_now = {"added_cond_kwargs": told}
            guess = unet(noisy, t, encoder_hidden_states=embeddings.double(), **told_now).sample
            found.append((guess - noise).square().flatten(start_dim=1).mean(dim=1))
    return torch.stack(found).mean(dim=0)


@pytest.mark.slow
@torch.no_grad()
def test_the_score_is_beta_halves_of_the_difference_of_errors_by_diffusers(run, base):
    before = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
    if (run / "final/unet").is_dir():
        after = diffusers.StableDiffusionXLPipeline.from_pretrained(run / "final")
    else:
        after = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
        after.load_lora_weights(run / "final")
    expected = 2.0 / 2 * (errors_by_diffusers(before, 3, 2) - errors_by_diffusers(after, 3, 2))
    scores = scorer(run).score(images(), PROMPTS)
    assert scores.tolist() == pytest.approx(expected.tolist(), abs=2e-5)
    assert expected.abs().min() > 1e-3  # the comparison would also hold for zeros
    named = scorer(run, reference=str(base)).score(images(), PROMPTS)
    assert named.tolist() == pytest.approx(expected.tolist(), abs=2e-5)


@pytest.mark.slow
def test_a_score_depends_on_image_and_prompt_alone(run):
    one = scorer(run, images_per_batch=2)
    together = one.score(images(), PROMPTS)
    alone = one.score(images()[1:2], PROMPTS[1:2])
    assert alone.item() == pytest.approx(together[1].item(), abs=1e-5)
    assert together.tolist() == scorer(run, images_per_batch=2).score(images(), PROMPTS).tolist()
    swapped = one.score(images()[:1], PROMPTS[1:2])
    assert abs(swapped[0] - together[0]) > 1e-6


@pytest.mark.slow
def test_policy_and_reference_alike_make_zero(run, base):
    assert scorer(base, reference=str(base)).score(images(), PROMPTS).tolist() == [0.0] * 3
    back = Implicit(policy=str(base), reference=str(run), beta=2.0, timesteps=3, noises=2)
    forth = scorer(run).score(images(), PROMPTS)
    assert back.score(images(), PROMPTS).tolist() == pytest.approx((-forth).tolist(), abs=2e-5)


@pytest.mark.slow
def test_the_fingerprint_tells_checkpoints_and_settings_apart(run, base):
    found = {
        scorer(run).fingerprint,
        scorer(run / "checkpoint-1").fingerprint,
        scorer(run, beta=3.0).fingerprint,
        scorer(run, timesteps=4).fingerprint,
        scorer(run, noises=1).fingerprint,
        scorer(run, reference=str(run / "checkpoint-1")).fingerprint,
    }
    assert len(found) == 6
    assert scorer(run).fingerprint == scorer(run, reference=str(base)).fingerprint
    assert scorer(run).fingerprint == scorer(run, images_per_batch=1).fingerprint


def test_a_model_that_is_no_run_needs_a_reference(base):
    with pytest.raises(ConfigError, match=r"is no training run.*give scorer\.reference"):
        scorer(base).score(images(), PROMPTS)
    with pytest.raises(ValueError, match="beta must be greater than 0"):
        scorer(base, beta=0.0)


@pytest.mark.slow
def test_images_that_the_autoencoder_cannot_take_are_refused(run):
    with pytest.raises(ValueError, match="must be multiples of"):
        scorer(run).score(torch.zeros(1, 3, 30, 30), ["a"])
