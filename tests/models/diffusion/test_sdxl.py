from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from diffalign.models.diffusion.conditioning import Framing
from diffalign.models.diffusion.sdxl import SDXL, time_ids


@pytest.fixture
def framing():
    return Framing(
        original_sizes=torch.tensor([[1023, 4097], [512, 768]]),
        crop_corners=torch.tensor([[3, 0], [0, 128]]),
        target_size=(32, 64),
    )


def test_prompts_are_encoded_as_the_pipeline_does(tiny_sdxl):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    prompts = ["a red circle", "", "a prompt far too long for the tokenizer of a tiny model"]
    expected, _, expected_pooled, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False
    )

    embeddings = SDXL(path=str(tiny_sdxl)).conditioner(pipeline).encode(prompts)

    assert embeddings.hidden_states.shape == (3, 16, 16)
    assert torch.equal(embeddings.hidden_states, expected)
    assert torch.equal(embeddings.pooled, expected_pooled)


def test_size_and_crop_are_told_as_the_pipeline_tells_them(tiny_sdxl, framing):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    expected = pipeline._get_add_time_ids(
        (1023, 4097), (3, 0), (32, 64), torch.float32, text_encoder_projection_dim=8
    )

    ids = time_ids(framing, size_conditioning="per_sample")

    assert ids.dtype == torch.float32
    assert torch.equal(ids[:1], expected)
    assert ids[1].tolist() == [512, 768, 0, 128, 32, 64]


def test_fixed_size_conditioning_is_that_of_an_uncropped_file(framing):
    ids = time_ids(framing, size_conditioning="fixed")

    assert ids.tolist() == [[32, 64, 0, 0, 32, 64]] * 2
