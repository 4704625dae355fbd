"""The network of ImageReward: BLIP's vision tower, its text encoder looking at it, and a head.

Built of transformers' BLIP. Weights bear the names of the authors' checkpoint, which are those of
Salesforce's BLIP; `RENAMED` has the mapping.

Source: Xu et al. 2023, arXiv:2304.05977; THUDM/ImageReward, ImageReward.py and models/BLIP.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipTextModel, BlipVisionModel

from diffalign.errors import ModelError
from diffalign.files import read_json
from diffalign.models.preference.clip_loading import blank

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the authors' data; rewards have mean 0 and variance 1 there."""
HEAD_WIDTHS = (1024, 128, 64, 16, 1)
"""Outputs of the head's layers, which have no activation between them."""
RELEASED: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
    },
}
"""ViT-L/16 and BERT base, as a BlipConfig. The epsilons and the twelve heads are the authors':
transformers' defaults are others."""

RENAMED = [
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (
        r"^blip\.visual_encoder\.blocks\.(\d+)\.norm(\d)\.",
        r"vision.encoder.layers.\1.layer_norm\2.",
    ),
    (
        r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.",
        r"vision.encoder.layers.\1.self_attn.qkv.",
    ),
    (
        r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.",
        r"vision.encoder.layers.\1.self_attn.projection.",
    ),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^mlp\.layers\.", "head."),
]
"""The names of the checkpoint, and those in `BLIPReward`."""
UNUSED = re.compile(r"blip\.(vision|text)_proj\.(weight|bias)")
"""Weights that the checkpoint has from BLIP's own training, and no score depends on."""


class BLIPReward(nn.Module):
    """Rewards of images for prompts, by cross-attention of the prompt's tokens to the image."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        text_config: Any = config.text_config
        vision_config: Any = config.vision_config
        text_config.is_decoder = True  # that is how transformers asks for cross-attention
        text_config.encoder_hidden_size = vision_config.hidden_size
        self.vision = BlipVisionModel(vision_config)
        self.text = BlipTextModel(text_config, add_pooling_layer=False)
        widths = (text_config.hidden_size, *HEAD_WIDTHS)
        linears = [nn.Linear(a, b) for a, b in zip(widths, HEAD_WIDTHS, strict=False)]
        layers = [layer for linear in linears[:3] for layer in (linear, nn.Dropout())]
        self.head = nn.Sequential(*layers, *linears[3:])  # what drops out counts in the names

    @property
    def image_size(self) -> int:
        """Side of the square images that the tower takes, pixels."""
        config: Any = self.vision.config
        return int(config.image_size)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Rewards, standardised by the authors' mean and deviation.

        Args:
            pixels: normalised as CLIP's, shape [n, 3, image_size, image_size].
            tokens: int64 [n, length], beginning with BERT's class token.
            mask: 1 for tokens and 0 for padding, int64 [n, length].

        Returns:
            Shape [n], float32.
        """
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(
                seen.shape[:-1], dtype=torch.long, device=seen.device
            ),
            is_decoder=False,  # every token sees every other
        ).last_hidden_state
        rewards: Tensor = self.head(read[:, 0].float())[:, 0]
        return (rewards - MEAN) / STD

    def in_precision(self, dtype: torch.dtype) -> BLIPReward:
        """The same with its BLIP in another precision; the head stays in float32."""
        for part in (self.vision, self.text):
            nn.Module.to(part, dtype)
        return self


def blank_reward(config_file: Path | None) -> BLIPReward:
    """A network in float32 on the CPU whose weights are still to be filled in.

    Args:
        config_file: a config.json of transformers' BLIP; None for the released architecture.

    Raises:
        ModelError: the file is another model's.
    """
    content = RELEASED if config_file is None else read_json(config_file, error=ModelError)
    if config_file is not None and content.get("model_type") != "blip":
        raise ModelError(
            f"{config_file} is of a {content.get('model_type')}, and ImageReward is a blip: name "
            f"the file of weights itself for the released architecture"
        )
    config = BlipConfig.from_dict(content)
    network: BLIPReward = blank(lambda: BLIPReward(config))
    return network
