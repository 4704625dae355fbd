"""Checkpoints in the original layout, at the true sizes of SD 1.5, SD 2 and SDXL, without values:
diffusers knows each for what it is, and finds every weight in its shape."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffalign.errors import ModelError
from diffalign.models.diffusion.original_layout import checkpoint_tensors, unet_module_name
from tests.models.diffusion.test_kohya import SD15, SDXL

SD2 = {**SD15, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}
SD2["use_linear_projection"] = True
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
OPEN_CLIP = {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096}
OPEN_CLIP |= {"num_hidden_layers": 23, "num_attention_heads": 16}
BIG_G = {**OPEN_CLIP, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
BIG_G |= {"num_attention_heads": 20, "projection_dim": 1280}
MODELS = {"v1": (SD15, CLIP), "v2": (SD2, OPEN_CLIP), "xl_base": (SDXL, CLIP)}


def pipeline(kind):
    unet, text = MODELS[kind]
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel.from_config(unet),
            "vae": AutoencoderKL.from_config(VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        }
        if kind == "xl_base":
            parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**BIG_G))
    return SimpleNamespace(**parts, scheduler=SimpleNamespace(config={}))


def shapes(tensors, *, prefix=""):
    return {
        name.removeprefix(prefix): tuple(value.shape)
        for name, value in tensors.items()
        if not name.endswith("position_ids")
    }


@pytest.mark.parametrize("kind", MODELS)
def test_diffusers_finds_every_weight_of_the_real_models(kind):
    original = pipeline(kind)
    tensors = checkpoint_tensors(original)
    assert single_file_utils.infer_diffusers_model_type(tensors) == kind
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), original.unet.config)
    assert shapes(unet) == shapes(original.unet.state_dict())
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), original.vae.config)
    assert shapes(vae) == shapes(original.vae.state_dict())
    encoders = {"text_encoder": original.text_encoder}
    prefixes = {"text_encoder": "cond_stage_model.model."}
    if kind == "xl_base":
        encoders["text_encoder_2"] = original.text_encoder_2
        prefixes["text_encoder_2"] = "conditioner.embedders.1.model."
    for name, encoder in encoders.items():
        if encoder.config.hidden_act == "gelu":
            read = single_file_utils.convert_open_clip_checkpoint(
                encoder, dict(tensors), prefix=prefixes[name]
            )
        else:
            read = single_file_utils.convert_ldm_clip_checkpoint(dict(tensors))
        assert shapes(read, prefix="text_model.") == shapes(
            encoder.state_dict(), prefix="text_model."
        )


def test_a_layer_without_an_original_name_is_refused():
    for name, config in [("class_embedding.linear_1", SD15), ("time_embedding.cond_proj", SDXL)]:
        with pytest.raises(ModelError, match=rf"has no name for {name}: export a diffusers fol"):
            unet_module_name(name, {**config, "layers_per_block": 2})
    with pytest.raises(ModelError, match=r"\[1, 2\] layers per block"):
        unet_module_name("down_blocks.0.resnets.0.conv1", {"layers_per_block": [1, 2]})
