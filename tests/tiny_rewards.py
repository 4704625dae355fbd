"""Released reward models in small: random weights in files and under names as the real ones have.

Each function writes the files and returns what computes the score by the library's own modules.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

from tests.tiny_clip import write_clip

HPS = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
}
BLIP: dict[str, Any] = {
    "model_type": "blip",
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 40,
        "layer_norm_eps": 1e-12,
    },
}
WORDS = ["a", "the", "red", "blue", "green", "circle", "square", "cross", "left", "of"]


def spread(network: nn.Module, *, seed: int = 0) -> nn.Module:
    """Weights so far apart that scores of images differ."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        scale = 0.4 if parameter.ndim > 1 else 0.1
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = noise if parameter.ndim > 1 else parameter.data + noise
    return network.eval()


def _spread_head(head: nn.Module) -> None:
    """The same for many layers in a row, whose outputs stay of the size of their inputs."""
    spread(head, seed=1)
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data *= 2.5 / layer.in_features**0.5


def write_hpsv2(folder: Path) -> open_clip.CLIP:
    """A folder in open_clip's layout, whose configuration is a ViT-H-14 in small."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": HPS}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = open_clip.CLIP(**HPS)
    spread(network)
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    return network


def write_bert_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Whole words, framed as BERT's."""
    special = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    words = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, words[token]) for token in ("[CLS]", "[SEP]")],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in special.items()}
    )
    fast.save_pretrained(folder)
    return fast


def write_imagereward(folder: Path) -> tuple[Any, nn.Sequential]:
    """Weights under the names of ImageReward.pt, and a BLIP's config.json; the tokenizer next to
    them. Returns a BLIP of transformers and the head."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_bert_tokenizer(folder)
    text = {**BLIP["text_config"], "vocab_size": len(tokenizer) + 2}
    settings = {**BLIP, "text_config": text}
    (folder / "config.json").write_text(json.dumps(settings))
    config = BlipConfig.from_dict(json.loads(json.dumps(settings)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blip = BlipForImageTextRetrieval(config)
        head = nn.Sequential(
            nn.Linear(24, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )
    spread(blip)
    _spread_head(head)
    state = {f"mlp.layers.{name}": value for name, value in head.state_dict().items()}
    for name, value in blip.state_dict().items():
        if (theirs := _name_in_imagereward(name)) is not None:
            state[theirs] = value.clone()
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state["blip.vision_proj.weight"] = torch.zeros(4, 32)
    state["blip.text_proj.bias"] = torch.zeros(4)
    save_file(state, folder / "model.safetensors")
    return blip, head.eval()


def _name_in_imagereward(name: str) -> str | None:
    if name.startswith("text_encoder."):
        return f"blip.{name}"
    for ours, theirs in {
        "vision_model.embeddings.class_embedding": "cls_token",
        "vision_model.embeddings.position_embedding": "pos_embed",
        "vision_model.embeddings.patch_embedding": "patch_embed.proj",
        "vision_model.post_layernorm": "norm",
    }.items():
        if name.startswith(ours):
            return f"blip.visual_encoder.{theirs}{name.removeprefix(ours)}"
    if name.startswith("vision_model.encoder.layers."):
        number, part, *rest = name.removeprefix("vision_model.encoder.layers.").split(".")
        part = {"self_attn": "attn", "layer_norm1": "norm1", "layer_norm2": "norm2"}.get(part, part)
        inner = ".".join(rest).replace("projection", "proj")
        return f"blip.visual_encoder.blocks.{number}.{part}.{inner}"
    return None  # heads of BLIP that ImageReward has not


def write_aesthetic(
    folder: Path, form: str = "linearMSE"
) -> tuple[CLIPVisionModelWithProjection, nn.Module]:
    """A CLIP in `clip/` and a head, `head.safetensors`, of one of the three released forms."""
    write_clip(folder / "clip")
    tower = CLIPVisionModelWithProjection.from_pretrained(folder / "clip", projection_dim=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = _aesthetic_head(form)
    _spread_head(head)
    state: dict[str, Tensor] = head.state_dict()
    if form != "linear":
        state = {f"layers.{name}": value for name, value in state.items()}
    save_file(state, folder / "head.safetensors")
    return tower.eval(), head


def _aesthetic_head(form: str) -> nn.Module:
    if form == "linear":
        return nn.Linear(12, 1)
    if form == "linearMSE":
        return nn.Sequential(
            nn.Linear(12, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )
    return nn.Sequential(
        nn.Linear(12, 1024),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Linear(16, 1),
    )


def two_images() -> list[Tensor]:
    """Fixed images in [-1, 1], one high and one wide, with waves, noise and a hard edge."""
    images = []
    for seed, (height, width) in enumerate([(90, 64), (47, 120)]):
        generator = torch.Generator().manual_seed(seed)
        rows, columns = torch.meshgrid(
            torch.linspace(0, 9, height), torch.linspace(0, 5, width), indexing="ij"
        )
        waves = torch.stack([(rows + k).sin() * (columns * (k + 1)).cos() for k in range(3)])
        image = 0.7 * waves + 0.2 * torch.randn(waves.shape, generator=generator)
        image[:, height // 3 : height // 2, width // 4 :] = torch.tensor([0.9, -0.8, 0.1])[
            :, None, None
        ]
        images.append(image.clamp(-1, 1))
    return images
