from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import ModelError
from diffalign.models.diffusion.pipeline_lora import add_adapter

UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
ENCODER = "text_model.encoder.layers.0.self_attn"


@pytest.fixture
def pipeline(tiny_sdxl):
    return DiffusionPipeline.from_pretrained(tiny_sdxl)


def factors(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of shapes [rank, in] and [out, rank]."""
    generator = torch.Generator().manual_seed(seed)
    out, into = weight.shape
    return torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)


def weight_of(network, layer: str) -> Tensor:
    if not hasattr(network, "text_model"):  # transformers 5
        layer = layer.removeprefix("text_model.")
    return network.get_submodule(layer).weight


def adapter(pipeline, style: str, *, alpha: float = 2.0) -> tuple[dict[str, Tensor], dict]:
    """Layers of a UNet, of ranks 2 and 3, and of both text encoders, in the names of `style`.

    Returns:
        The tensors of the file, and what each weight gains.
    """
    layers = [
        ("unet", f"{UNET}.to_q", 2),
        ("unet", f"{UNET}.to_out.0", 3),
        ("text_encoder", f"{ENCODER}.q_proj", 2),
        ("text_encoder_2", f"{ENCODER}.out_proj", 2),
    ]
    short = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    tensors, gains = {}, {}
    for seed, (component, layer, rank) in enumerate(layers):
        first, second = factors(weight_of(getattr(pipeline, component), layer), rank, seed)
        if style == "diffusers":
            name = f"{component}.{layer}"
            tensors |= {f"{name}.lora_A.weight": first, f"{name}.lora_B.weight": second}
            scale = 1.0  # no metadata: the rank
        else:
            name = f"{short[component]}_{layer.replace('.', '_')}"
            tensors |= {f"{name}.lora_down.weight": first, f"{name}.lora_up.weight": second}
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
            scale = alpha / rank
        gains[component, layer] = scale * second @ first
    return tensors, gains


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_every_part_of_a_pipeline_gains_what_the_file_says(pipeline, tmp_path, style):
    tensors, gains = adapter(pipeline, style)
    expected = {
        key: weight_of(getattr(pipeline, key[0]), key[1]).detach() + gain
        for key, gain in gains.items()
    }
    save_file(tensors, tmp_path / "x.safetensors")

    add_adapter(pipeline, tmp_path / "x.safetensors", merge=True)

    for (component, layer), value in expected.items():
        changed = weight_of(getattr(pipeline, component), layer)
        torch.testing.assert_close(changed, value, atol=1e-5, rtol=1e-5)
    names = [n for part in ("unet", "text_encoder") for n in getattr(pipeline, part).state_dict()]
    assert not any("lora" in name for name in names)


@pytest.mark.parametrize(
    ("header", "scales"),
    [
        ({"unet.r": 2, "unet.lora_alpha": 4}, (2.0, 4 / 3)),
        ({"unet.r": 2, "unet.lora_alpha": 4, "unet.use_rslora": True}, (4 / 2**0.5, 4 / 3**0.5)),
        ({"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 1}}, (0.5, 4 / 3)),
    ],
)
def test_the_strength_in_a_files_header_is_kept(pipeline, tmp_path, header, scales):
    tensors, gains = adapter(pipeline, "diffusers")
    ours = {name: value for name, value in tensors.items() if name.startswith("unet.")}
    layers = [f"{UNET}.to_q", f"{UNET}.to_out.0"]
    before = [weight_of(pipeline.unet, layer).detach().clone() for layer in layers]
    metadata = {"lora_adapter_metadata": json.dumps(header)}
    save_file(ours, tmp_path / "x.safetensors", metadata=metadata)

    add_adapter(pipeline, tmp_path / "x.safetensors", merge=True)

    for layer, weight, scale in zip(layers, before, scales, strict=True):
        expected = weight + scale * gains["unet", layer]
        torch.testing.assert_close(weight_of(pipeline.unet, layer), expected, atol=1e-5, rtol=1e-5)


def test_apart_from_the_weights_an_adapter_does_the_same(tiny_sdxl, tmp_path):
    merged, apart = (DiffusionPipeline.from_pretrained(tiny_sdxl) for _ in range(2))
    tensors, _ = adapter(merged, "kohya", alpha=0.5)
    save_file(tensors, tmp_path / "x.safetensors")
    add_adapter(merged, tmp_path / "x.safetensors", merge=True)
    add_adapter(apart, tmp_path / "x.safetensors", merge=False)

    tokens = torch.arange(6)[None]
    first, second = (part.text_encoder_2(tokens).text_embeds for part in (merged, apart))

    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    assert any("lora_A" in name for name, _ in apart.unet.named_parameters())
    assert not any(p.requires_grad for p in apart.unet.parameters())


def test_a_convolution_of_one_pixel_fits_a_linear_layer(pipeline, tmp_path):
    tensors, gains = adapter(pipeline, "kohya")
    shaped = {k: v if v.ndim < 2 else v[..., None, None].contiguous() for k, v in tensors.items()}
    before = weight_of(pipeline.unet, f"{UNET}.to_q").detach().clone()
    save_file(shaped, tmp_path / "x.safetensors")

    add_adapter(pipeline, tmp_path / "x.safetensors", merge=True)

    changed = weight_of(pipeline.unet, f"{UNET}.to_q")
    torch.testing.assert_close(changed, before + gains["unet", f"{UNET}.to_q"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["text_encoder_7.layer.lora_A.weight"], "changes no layer of this base with text_enc"),
        (["unet.nowhere.to_q.lora_A.weight", "unet.nowhere.to_q.lora_B.weight"], "unet cannot be"),
        (["lora_unet_down_blocks_0_x.dora_scale"], "a DoRA in the layout of kohya-ss"),
        (["lora_unet_down_blocks_0_x.hada_w1_a"], "no known layout"),
        (["unet.conv_in.weight"], "no part of a LoRA"),
        ([f"unet.{UNET}.to_q.lora_A.weight"], "only in this base"),
        ([f"unet.{UNET}.to_q.lora_A.weight", f"unet.{UNET}.to_q.lora_B.weight"], "of shape"),
        ([], "holds no tensors"),
    ],
)
def test_what_does_not_fit_is_refused(pipeline, tmp_path, names, message):
    file: Path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, file)

    with pytest.raises(ModelError, match=rf"other\.safetensors.*{message}"):
        add_adapter(pipeline, file, merge=True)
