"""LoRA files for ComfyUI, A1111 and kohya's tools: names, scales, shapes, and the images."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn

from diffalign.models.diffusion.kohya import LoraLayer, kohya_lora, lora_names
from diffalign.models.diffusion.original_layout import unet_module_name
from diffalign.models.lora import DENOISER
from tests import original_names
from tests.original_names import OLD_READER

SD15 = {
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "sample_size": 64,
}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": (1, 2, 10),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def real(request):
    """A UNet of the true size without values, its layers, and what they are called originally."""
    config, known = {
        "sd15": (SD15, original_names.SD15),
        "sdxl": (SDXL, original_names.SDXL),
    }[request.param]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    modules = [n for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return unet, modules, known


def usual(modules):
    return [name for name in modules if name.endswith(DENOISER.usual)]


def test_every_layer_of_the_real_unets_has_its_original_name(real):
    unet, modules, known = real
    assert sorted(modules) == sorted(known)
    assert {name: unet_module_name(name, unet.config) for name in modules} == known


@pytest.mark.parametrize("chosen", ["usual", "no embeddings", "all"])
def test_comfyui_and_a1111_find_every_layer_of_the_real_unets(real, chosen):
    unet, modules, known = real
    modules = {
        "usual": usual(modules),
        "no embeddings": [m for m in modules if "embedding" not in m],
        "all": modules,
    }[chosen]
    names = lora_names(modules, unet.config)
    comfyui = original_names.comfyui_key_map(known)
    assert len(set(names.values())) == len(modules) > 100
    assert {m: comfyui.get(name) for m, name in names.items()} == {m: known[m] for m in modules}
    assert {m: original_names.a1111_layer(n, known) for m, n in names.items()} == {
        m: known[m] for m in modules
    }


def test_the_usual_layers_are_called_as_diffusers_calls_them(real):
    unet, modules, _ = real
    names = lora_names(usual(modules), unet.config)
    assert names == {m: f"lora_unet_{m.replace('.', '_')}" for m in usual(modules)}


@pytest.mark.parametrize("chosen", ["usual", "all"])
def test_diffusers_finds_every_layer_of_the_real_unets(real, chosen):
    if chosen == "all" and OLD_READER:
        pytest.skip(OLD_READER)
    unet, modules, _ = real
    modules = usual(modules) if chosen == "usual" else modules
    blank = torch.zeros(1, 1)
    layers = {module: LoraLayer(blank, blank, 1.0) for module in modules}
    file = kohya_lora(layers, unet.config, dtype=torch.float32, title="x", base="y", velocity=False)
    sdxl = unet.config.addition_embed_type == "text_time"
    pipeline = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    read, alphas = pipeline.lora_state_dict(dict(file.tensors), unet_config=unet.config)
    found = {
        name.removeprefix("unet.")
        .replace(".processor", "")
        .replace("to_out_lora", "to_out.0_lora")
        .partition("_lora." if "_lora." in name else ".lora.")[0]
        for name in read
    }
    assert found == set(modules)
    assert len(alphas) == len(modules)
