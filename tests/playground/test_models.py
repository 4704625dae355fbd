"""The tiny SDXL is a real one: standard classes, standard folder, standard pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file

from diffalign.errors import DataError, ModelError
from diffalign.playground import models
from diffalign.playground.models import (
    PROMPT_TOKENS,
    SCALING_FACTOR,
    build_pipeline,
    build_tokenizer,
    build_vae,
    playground_model_path,
    playground_preferences_path,
    save_pipeline,
    standardise_latents,
)
from diffalign.playground.oracle import PlaygroundOracle
from diffalign.playground.scenes import KINDS, caption, describe, render, sample_scene

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


def scenes(seeds: range) -> torch.Tensor:
    arrays = [np.array(render(sample_scene(seed))) for seed in seeds]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def test_equal_seeds_give_equal_weights_and_leave_the_global_state_alone():
    before = torch.random.get_rng_state()
    first, second, other = build_pipeline(3), build_pipeline(3), build_pipeline(4)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [pipeline.unet.conv_in.weight for pipeline in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_saved_pipeline_opens_again_and_samples(tmp_path):
    build_pipeline(0).save_pretrained(tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red circle", num_inference_steps=2, guidance_scale=2.0).images
    assert [image.size for image in images] == [(64, 64)]


def test_a_saved_pipeline_is_half_as_large_and_equal_after_reopening(tmp_path):
    pipeline = build_pipeline(0)
    save_pipeline(pipeline, tmp_path)
    opened = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 6e6
    for name in NETWORKS:
        before, after = (getattr(each, name).state_dict() for each in (pipeline, opened))
        torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_shipped_text_encoders_carry_the_names_that_every_transformers_reads(name):
    names = load_file(playground_model_path() / name / "model.safetensors")
    assert {key.split(".")[0] for key in names} <= {"text_model", "text_projection"}


def test_every_word_of_a_caption_is_one_token_and_three_objects_fit():
    tokenizer = build_tokenizer(pad_token="!")
    for i in range(len(KINDS) - 2):
        text = describe(KINDS[i : i + 3])
        words = [token.removesuffix("</w>") for token in tokenizer.tokenize(text)]
        assert words == text.split()
        assert len(words) + 2 <= PROMPT_TOKENS


def test_the_second_tokenizer_pads_with_an_exclamation_mark_as_sdxl_does():
    tokenizer = build_tokenizer(pad_token="!")
    ids = tokenizer("a red circle", padding="max_length").input_ids
    assert len(ids) == PROMPT_TOKENS
    assert tokenizer.convert_ids_to_tokens(ids)[-1] == "!"
    assert ids.index(tokenizer.eos_token_id) == 4


def test_standardising_gives_unit_latents_and_keeps_reconstructions():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = build_vae()
    images = scenes(range(8))
    with torch.no_grad():
        old = vae.encode(images).latent_dist
        before = vae.decode(old.mode()).sample
        standardise_latents(vae, images)
        new = vae.encode(images).latent_dist
        after = vae.decode(new.mode()).sample
    scaled = new.mean * SCALING_FACTOR
    spread = old.mean.std(dim=(0, 2, 3), keepdim=True) * SCALING_FACTOR
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(scaled.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(scaled.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(new.std, old.std / spread)  # the noise is scaled like the mean


def test_missing_assets_are_named_with_the_command_that_makes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_assets", lambda: tmp_path)
    with pytest.raises(ModelError, match=r"scripts/pretrain_playground\.py --out"):
        playground_model_path()
    with pytest.raises(DataError, match=r"scripts/make_playground_preferences\.py --out"):
        playground_preferences_path()


def test_the_shipped_model_is_small_and_holds_no_pickle():
    folder = playground_model_path()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    networks = [getattr(pipeline, name) for name in NETWORKS]
    assert sum(p.numel() for network in networks for p in network.parameters()) < 8e6
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}


def test_the_oracle_reads_shipped_autoencoder_round_trips():
    vae = AutoencoderKL.from_pretrained(playground_model_path(), subfolder="vae")
    seeds = range(20_000, 20_300)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(scenes(seeds)).latent_dist.mode()).sample
    scores = PlaygroundOracle().score(decoded, [caption(sample_scene(seed)) for seed in seeds])
    assert (scores == 1).float().mean() >= 0.95
