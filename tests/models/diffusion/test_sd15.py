from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline

from diffalign.models.diffusion.sd15 import SD15


def test_prompts_are_encoded_as_the_pipeline_does(tiny_sd15):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15)
    prompts = ["a red circle", "", "a prompt far too long for the tokenizer of a tiny model"]
    expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)

    embeddings = SD15(path=str(tiny_sd15)).conditioner(pipeline).encode(prompts)

    assert embeddings.hidden_states.shape == (3, 16, 8)
    assert torch.equal(embeddings.hidden_states, expected)
    assert embeddings.pooled is None
