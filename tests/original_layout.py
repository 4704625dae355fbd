"""A tiny Stable Diffusion 1.5 folder as one file, under the names of the original release."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_AUTOENCODER = [
    (r"conv_norm_out", r"norm_out"),
    (r"conv_shortcut", r"nin_shortcut"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", r"mid.attn_1"),
    (r"attn_1\.group_norm", r"attn_1.norm"),
    (r"attn_1\.to_out\.0", r"attn_1.proj_out"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
]


def _unet_name(name: str) -> str:
    """For two levels of one layer each; the original counts blocks, not levels."""
    kind, *parts = name.split(".")
    if kind in ("down_blocks", "up_blocks"):
        level, what, layer, *rest = parts
        side, start = ("input_blocks", 1) if kind == "down_blocks" else ("output_blocks", 0)
        if what == "downsamplers":
            return f"{side}.{start + 2 * int(level) + 1}.0.op.{rest[-1]}"
        if what == "upsamplers":
            return f"{side}.{start + 2 * int(level) + 1}.2.conv.{rest[-1]}"
        return f"{side}.{start + 2 * int(level) + int(layer)}.{_layer_name(what, rest)}"
    if kind == "mid_block":
        what, layer, *rest = parts
        if what == "attentions":
            return f"middle_block.1.{'.'.join(rest)}"
        return f"middle_block.{2 * int(layer)}.{_RESNET[rest[0]]}.{rest[1]}"
    module, _, leaf = name.rpartition(".")
    return f"{_ENDS[module]}.{leaf}"


def _layer_name(what: str, rest: list[str]) -> str:
    return f"0.{_RESNET[rest[0]]}.{rest[1]}" if what == "resnets" else f"1.{'.'.join(rest)}"


def _autoencoder_entry(name: str, value: Tensor) -> tuple[str, Tensor]:
    for pattern, replacement in _AUTOENCODER:
        name = re.sub(pattern, replacement, name)
    attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
    return name, value[:, :, None, None] if attention else value  # once convolutions


def write_single_file(folder: Path, file: Path) -> Path:
    """Write the weights of a folder from `tests.tiny_models.write_sd15` into one file."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    state = {f"model.diffusion_model.{_unet_name(name)}": value for name, value in unet.items()}
    for name, value in vae.items():
        original, value = _autoencoder_entry(name, value)
        state[f"first_stage_model.{original}"] = value
    for name, value in text.items():
        bare = name.removeprefix("text_model.")
        state[f"cond_stage_model.transformer.text_model.{bare}"] = value
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    return file
