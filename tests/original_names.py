"""The UNets of Stable Diffusion layer by layer, under their two names, and how ComfyUI and A1111
look a layer of a LoRA up: re-stated from their sources, independently of the package.

Read in ComfyUI: `comfy/utils.py` (`unet_to_diffusers`), `comfy/lora.py` (`model_lora_keys_unet`),
`comfy/weight_adapter/` (`lora.py`, `base.py`). In A1111: `extensions-builtin/Lora/networks.py`
(`convert_diffusers_name_to_compvis`, `load_network`). Neither program was run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import diffusers
import torch
from packaging.version import Version
from torch import Tensor

OLD_READER = (
    "this diffusers reads kohya's names of embeddings and first and last convolutions wrongly"
    if Version(diffusers.__version__) < Version("0.42")
    else ""
)
"""Why its reader is not held against ours, where it is not; 0.33 fails, 0.42 reads all of them."""

TRANSFORMER = [
    *(f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
]
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def layers(
    widths: list[int], down: list[int], up: list[int], middle: int, *, per_level: int, sdxl: bool
) -> dict[str, str]:
    """Names of all linear layers and convolutions: diffusers' -> the original one.

    Args:
        widths: channels of each level, from the outside in.
        down, up: transformer blocks of each layer of a level, in diffusers' order of levels.
        middle: of the middle block.
        per_level: residual layers of a level on the way down; one more on the way up.
        sdxl: whether sizes are embedded.
    """

    def resnet(ours: str, theirs: str, shortcut: bool) -> Iterator[tuple[str, str]]:
        for name, original in RESNET.items():
            if shortcut or name != "conv_shortcut":
                yield f"{ours}.{name}", f"{theirs}.{original}"

    def transformer(ours: str, theirs: str, depth: int) -> Iterator[tuple[str, str]]:
        parts = ["proj_in", "proj_out"]
        parts += [f"transformer_blocks.{block}.{p}" for block in range(depth) for p in TRANSFORMER]
        for part in parts:
            yield f"{ours}.{part}", f"{theirs}.{part}"

    def walk() -> Iterator[tuple[str, str]]:
        yield from [("conv_in", "input_blocks.0.0"), ("conv_out", "out.2")]
        yield from [(f"time_embedding.linear_{n}", f"time_embed.{2 * n - 2}") for n in (1, 2)]
        if sdxl:
            yield from [(f"add_embedding.linear_{n}", f"label_emb.0.{2 * n - 2}") for n in (1, 2)]
        block, width = 0, widths[0]
        for level, channels in enumerate(widths):
            for layer in range(per_level):
                block += 1
                ours, theirs = f"down_blocks.{level}", f"input_blocks.{block}"
                yield from resnet(f"{ours}.resnets.{layer}", f"{theirs}.0", width != channels)
                if down[level]:
                    yield from transformer(f"{ours}.attentions.{layer}", f"{theirs}.1", down[level])
                width = channels
            if level + 1 < len(widths):
                block += 1
                yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{block}.0.op"
        yield from resnet("mid_block.resnets.0", "middle_block.0", False)
        yield from transformer("mid_block.attentions.0", "middle_block.1", middle)
        yield from resnet("mid_block.resnets.1", "middle_block.2", False)
        block = -1
        for level in range(len(widths)):
            for layer in range(per_level + 1):
                block += 1
                ours, theirs = f"up_blocks.{level}", f"output_blocks.{block}"
                # A skip is joined to it, so the width always changes.
                yield from resnet(f"{ours}.resnets.{layer}", f"{theirs}.0", True)
                if up[level]:
                    yield from transformer(f"{ours}.attentions.{layer}", f"{theirs}.1", up[level])
            if level + 1 < len(widths):
                place = 2 if up[level] else 1  # after the residual layer, and the transformer
                yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{block}.{place}.conv"

    return dict(walk())


SD15 = layers([320, 640, 1280, 1280], [1, 1, 1, 0], [0, 1, 1, 1], 1, per_level=2, sdxl=False)
SDXL = layers([320, 640, 1280], [0, 2, 10], [10, 2, 0], 10, per_level=2, sdxl=True)
TINY_SD15 = layers([8, 16], [0, 1], [1, 0], 1, per_level=1, sdxl=False)
TINY_SDXL = layers([8, 16], [0, 2], [2, 0], 2, per_level=1, sdxl=True)


def comfyui_key_map(known: Mapping[str, str]) -> dict[str, str]:
    """Name in a LoRA -> layer of the model: both of a layer's names count."""
    originals = {f"lora_unet_{name.replace('.', '_')}": name for name in known.values()}
    return originals | {f"lora_unet_{ours.replace('.', '_')}": name for ours, name in known.items()}


def comfyui_weight(weight: Tensor, lora: Mapping[str, Tensor], name: str) -> Tensor:
    """What becomes of a weight under a LoRA of strength 1.

    Where a magnitude is given by output, ComfyUI divides by the length of the base's rows. LyCORIS,
    where the format comes from, and peft divide by that of the changed rows, and so is done here.
    """
    up, down = lora[f"{name}.lora_up.weight"], lora[f"{name}.lora_down.weight"]
    scale = lora[f"{name}.alpha"].item() / down.shape[0]
    change = scale * torch.mm(up.flatten(start_dim=1), down.flatten(start_dim=1))
    changed = weight + change.reshape(weight.shape)
    magnitude = lora.get(f"{name}.dora_scale")
    if magnitude is None:
        return changed
    assert magnitude.shape == (len(weight), *[1] * (weight.dim() - 1))
    length = changed.flatten(start_dim=1).norm(dim=1).reshape(magnitude.shape)
    return changed * (magnitude / length)


def a1111_layer(name: str, known: Mapping[str, str]) -> str | None:
    """The layer that A1111 takes a name for; None where it finds none.

    It counts on blocks of two layers, and on the up blocks of SD 1.5.
    """
    present = {
        f"diffusion_model_{original.replace('.', '_')}": original for original in known.values()
    }
    suffixes = {ours: theirs.replace(".", "_") for ours, theirs in RESNET.items()}

    def suffix(kind: str, rest: str) -> str:
        return suffixes.get(rest, rest) if kind == "resnets" else rest

    rules = [
        (r"lora_unet_conv_in(.*)", lambda m: f"input_blocks_0_0{m[1]}"),
        (r"lora_unet_conv_out(.*)", lambda m: f"out_2{m[1]}"),
        (
            r"lora_unet_time_embedding_linear_(\d+)(.*)",
            lambda m: f"time_embed_{2 * int(m[1]) - 2}{m[2]}",
        ),
        (
            r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
            lambda m: (
                f"input_blocks_{1 + 3 * int(m[1]) + int(m[3])}_"
                f"{int(m[2] == 'attentions')}_{suffix(m[2], m[4])}"
            ),
        ),
        (
            r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)",
            lambda m: (
                f"middle_block_{1 if m[1] == 'attentions' else 2 * int(m[2])}_{suffix(m[1], m[3])}"
            ),
        ),
        (
            r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
            lambda m: (
                f"output_blocks_{3 * int(m[1]) + int(m[3])}_"
                f"{int(m[2] == 'attentions')}_{suffix(m[2], m[4])}"
            ),
        ),
        (
            r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv",
            lambda m: f"input_blocks_{3 + 3 * int(m[1])}_0_op",
        ),
        (
            r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv",
            lambda m: f"output_blocks_{2 + 3 * int(m[1])}_{2 if int(m[1]) else 1}_conv",
        ),
    ]
    for pattern, compvis in rules:
        if match := re.match(pattern, name):
            found = present.get(f"diffusion_model_{compvis(match)}")
            if found:
                return found
            break
    return present.get(name.replace("lora_unet", "diffusion_model"))
