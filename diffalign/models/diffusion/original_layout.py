"""A pipeline as one checkpoint file in the layout of the original releases, which A1111, ComfyUI
and kohya's tools open: SD 1.x, SD 2.x and SDXL.

Diffusers reads that layout (`from_single_file`) and has no public way to write it; here is the
inverse of its mapping. The original numbers the blocks of a UNet through (`input_blocks.4.1`),
where diffusers counts levels and layers (`down_blocks.1.attentions.0`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ModelError

UNET_PREFIX = "model.diffusion_model."
"""What the names of a UNet's tensors begin with in a checkpoint."""

_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def unet_module_name(name: str, config: Mapping[str, Any]) -> str:
    """What a layer of a UNet is called in the original layout.

    Args:
        name: in diffusers, such as `down_blocks.1.attentions.0.proj_in`.
        config: of the UNet, for how many layers its blocks have.

    Raises:
        ModelError: the layout has no name for it.
    """
    if name in _ENDS:
        return _ENDS[name]
    per_block = config.get("layers_per_block")
    if not isinstance(per_block, int):
        raise ModelError(
            f"the UNet has {per_block} layers per block, and the original layout is known for "
            f"blocks of equally many: export a diffusers folder"
        )
    per_block += 1  # a downsampler is a block of its own, and up blocks have a layer more
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        way, level, kind, layer, rest = match.groups()
        number = int(level) * per_block + int(layer) + (way == "down")
        blocks = "input_blocks" if way == "down" else "output_blocks"
        return f"{blocks}.{number}.{_inside(kind, rest)}"
    if match := re.fullmatch(r"mid_block\.resnets\.(\d+)\.(.+)", name):
        return f"middle_block.{2 * int(match[1])}.{_RESNET[match[2]]}"
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", name):
        return f"middle_block.1.{match[1]}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", name):
        return f"input_blocks.{(int(match[1]) + 1) * per_block}.0.op"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", name):
        level = int(match[1])
        place = 2 if "Attn" in config["up_block_types"][level] else 1
        return f"output_blocks.{level * per_block + per_block - 1}.{place}.conv"
    raise ModelError(
        f"the original layout of Stable Diffusion has no name for {name}: export a diffusers folder"
    )


def _inside(kind: str, rest: str) -> str:
    return f"0.{_RESNET[rest]}" if kind == "resnets" else f"1.{rest}"


def checkpoint_tensors(pipeline: Any) -> dict[str, Tensor]:
    """All weights of a Stable Diffusion pipeline under their original names.

    Args:
        pipeline: of diffusers, with UNet, autoencoder and text encoders. Its tensors are shared,
            but for those that are laid out differently.

    Raises:
        ModelError: a part of it has no place in the layout.
    """
    state = dict(_unet(pipeline.unet))
    state |= _autoencoder(pipeline.vae)
    second = getattr(pipeline, "text_encoder_2", None)
    if second is not None:
        state |= _clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        state |= _open_clip(second, "conditioner.embedders.1.model.")
    elif pipeline.text_encoder.config.hidden_act == "gelu":  # of OpenCLIP: SD 2.x
        state |= _open_clip(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        state |= _clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    if second is not None:
        state |= _markers(pipeline.scheduler.config)
    return state


def _markers(schedule: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Empty tensors by which ComfyUI and others know an SDXL that predicts velocity, and one that
    was trained up to pure noise."""
    if schedule.get("prediction_type") == "v_prediction":
        yield "v_pred", torch.zeros(0)
        if schedule.get("rescale_betas_zero_snr"):
            yield "ztsnr", torch.zeros(0)


def _unet(unet: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in unet.state_dict().items():
        module, _, leaf = name.rpartition(".")
        yield f"{UNET_PREFIX}{unet_module_name(module, unet.config)}.{leaf}", value


def _autoencoder(vae: Any) -> Iterator[tuple[str, Tensor]]:
    last = len(vae.config.block_out_channels) - 1
    rules: list[tuple[str, Any]] = [
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"attn_1\.group_norm", "attn_1.norm"),
        (r"attn_1\.to_out\.0", "attn_1.proj_out"),
        (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    ]
    for name, value in vae.state_dict().items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name):
            value = value[:, :, None, None]  # these were convolutions
        yield f"first_stage_model.{name}", value


def _clip(encoder: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in _text_model(encoder):
        yield f"{prefix}text_model.{name}", value


def _open_clip(encoder: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Queries, keys and values are one matrix there, and the projection is transposed."""
    for name, value in _text_model(encoder):
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            block, module, leaf = match.groups()
            if module in _OPEN_CLIP:
                yield f"{prefix}transformer.resblocks.{block}.{_OPEN_CLIP[module]}.{leaf}", value
            continue
        original = {
            "embeddings.token_embedding.weight": "token_embedding.weight",
            "embeddings.position_embedding.weight": "positional_embedding",
            "final_layer_norm.weight": "ln_final.weight",
            "final_layer_norm.bias": "ln_final.bias",
        }
        if name in original:
            yield f"{prefix}{original[name]}", value
    text_model = dict(_text_model(encoder))
    for block in range(encoder.config.num_hidden_layers):
        for leaf in ("weight", "bias"):
            parts = [
                text_model[f"encoder.layers.{block}.self_attn.{part}_proj.{leaf}"] for part in "qkv"
            ]
            yield f"{prefix}transformer.resblocks.{block}.attn.in_proj_{leaf}", torch.cat(parts)
    if (projection := encoder.state_dict().get("text_projection.weight")) is not None:
        yield f"{prefix}text_projection", projection.T


def _text_model(encoder: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights of a text encoder without the prefix that some versions of transformers give."""
    for name, value in encoder.state_dict().items():
        if name != "text_projection.weight" and not name.endswith("position_ids"):
            yield name.removeprefix("text_model."), value
