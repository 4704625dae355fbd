"""A randomly initialised CLIP in some 100 kB, with a tokenizer that spells every word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from tests.tiny_models import TOKENS, write_tokenizer

IMAGE_SIZE = 32
"""Side of the images that its vision tower takes."""


def build_clip(*, seed: int = 0, **vision: Any) -> CLIPModel:
    """The network; `vision` changes the configuration of the vision tower."""
    config = CLIPConfig(
        text_config={
            "vocab_size": 138,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": TOKENS,
            "bos_token_id": 136,
            "eos_token_id": 137,
            "pad_token_id": 137,
        },
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 16,
            **vision,
        },
        projection_dim=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(config).eval()


def write_clip(folder: Path, *, seed: int = 0, **vision: Any) -> Path:
    """Write a folder that `CLIPModel.from_pretrained` and `AutoTokenizer.from_pretrained` open."""
    build_clip(seed=seed, **vision).save_pretrained(folder)
    write_tokenizer(folder).save_pretrained(folder)
    return folder
