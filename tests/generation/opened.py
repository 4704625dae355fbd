"""Tiny models as `generate` opens them, and others made of them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffalign.generation.models import ModelSpec, locate_model
from diffalign.generation.text_to_image import SamplerConfig, TextToImage

CPU = torch.device("cpu")
TEXTS, SEEDS = ["a cat", "a dog", "a cat", "two owls"], [0, 0, 1, 5]


def open_model(path: Path | ModelSpec, **sampler) -> TextToImage:
    spec = path if isinstance(path, ModelSpec) else ModelSpec(path=str(path))
    settings = SamplerConfig(**{"steps": 2, **sampler})
    return TextToImage.open(locate_model(spec), settings, device=CPU, dtype=torch.float32)


def change_weights(folder: Path, *, component: str = "unet", by: float = 0.05) -> None:
    """Move every tensor of a component a little."""
    (file,) = (folder / component).glob("*.safetensors")
    torch.manual_seed(0)
    moved = {name: t + by * torch.randn_like(t) for name, t in load_file(file).items()}
    save_file(moved, file, metadata={"format": "pt"})


def write_adapter(base: Path, folder: Path) -> Path:
    """A folder with a LoRA for a tiny SDXL, every matrix random."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"])
    inject_adapter_in_model(config, pipeline.unet)
    torch.manual_seed(0)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter)
    layers = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder
