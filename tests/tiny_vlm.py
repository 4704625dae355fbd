"""Randomly initialised vision-language models of some 100 kB, with processor and chat template.

The tokenizer spells words out, but for a few merges across a space: a prompt with a trailing space
and a response are other tokens together than apart.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

WIDTH = 16
SPREAD = 0.3
"""Standard deviation of the initial weights: wide enough for images to matter."""

_CHARACTERS = string.digits + string.ascii_letters + string.punctuation
_SPACE, _NEWLINE = "Ġ", "Ċ"
"""How a byte-level tokenizer writes them."""
_MERGES = [(_SPACE, "a"), (_SPACE, "T"), (_SPACE, "t"), ("c", "a"), ("ca", "t")]

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As LLaVA-1.5's: images first, a space after every turn, no end of sequence."""
MISTRAL_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] == 'user' %}{{ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ '</s> ' }}{% endif %}"
    "{% endfor %}"
)
"""As LLaVA-NeXT's on Mistral: its generation prompt is empty, responses end with `</s>`."""
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen2-VL's: images where they stand, a line break after the end of a turn."""


def tiny_llava(folder: Path, *, vocabulary: int | None = None, **changes: Any) -> Path:
    """Write a LLaVA-1.5 of four image tokens an image.

    Args:
        folder: created.
        vocabulary: rows of the embedding; those that its tokenizer has, if None.
        **changes: to the processor, such as `patch_size=None` for what old checkpoints lack.
    """
    tokenizer = tiny_language_tokenizer()
    config = LlavaConfig(
        vision_config=clip_config(),
        text_config=_llama_config(tokenizer, vocabulary),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        initializer_range=SPREAD,
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_convert_rgb=True
    )
    settings = {
        "patch_size": 4,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        **changes,
    }
    processor = LlavaProcessor(images, tokenizer, chat_template=LLAVA_TEMPLATE, **settings)
    return write_model(folder, LlavaForConditionalGeneration, config, processor)


def tiny_llava_next(folder: Path) -> Path:
    """Write a LLaVA-NeXT that cuts images into tiles of 8 by 8 pixels."""
    tokenizer = tiny_language_tokenizer()
    grid = [[8, 16], [16, 8], [16, 16]]
    config = LlavaNextConfig(
        vision_config=clip_config(),
        text_config=_llama_config(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
        initializer_range=SPREAD,
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        image_grid_pinpoints=grid,
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=MISTRAL_TEMPLATE,
    )
    return write_model(folder, LlavaNextForConditionalGeneration, config, processor)


def tiny_qwen2_vl(folder: Path) -> Path:
    """Write a Qwen2-VL that gives one token to 8 by 8 pixels, and at most four to an image."""
    tokenizer = qwen_tokenizer()
    tower = {
        "depth": 2,
        "embed_dim": WIDTH,
        "hidden_size": WIDTH,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
        "initializer_range": SPREAD,
    }
    config = Qwen2VLConfig(vision_config=tower, **qwen_settings(tokenizer))
    processor = Qwen2VLProcessor(**qwen_parts(tokenizer), chat_template=CHATML_TEMPLATE)
    return write_model(folder, Qwen2VLForConditionalGeneration, config, processor)


def tiny_qwen2_5_vl(folder: Path) -> Path:
    """Write a Qwen2.5-VL, whose tower attends within windows of 2 by 2 tokens."""
    tokenizer = qwen_tokenizer()
    tower = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "out_hidden_size": WIDTH,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "initializer_range": SPREAD,
    }
    config = Qwen2_5_VLConfig(vision_config=tower, **qwen_settings(tokenizer))
    processor = Qwen2_5_VLProcessor(**qwen_parts(tokenizer), chat_template=CHATML_TEMPLATE)
    return write_model(folder, Qwen2_5_VLForConditionalGeneration, config, processor)


def write_model(folder: Path, model: Any, config: Any, processor: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model(config)
        for parameter in made.parameters():
            if parameter.dim() > 1 and not parameter.any():  # Gemma 3's projector, for one
                torch.nn.init.normal_(parameter, std=SPREAD)
        made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def raw_tokenizer(specials: list[str], *, begins: str | None) -> Tokenizer:
    alphabet = [*_CHARACTERS, _SPACE, _NEWLINE]
    tokens = [*specials, *alphabet, *(first + second for first, second in _MERGES)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, _MERGES, unk_token=specials[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    if begins is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begins} $A", special_tokens=[(begins, vocabulary[begins])]
        )
    return tokenizer


def tiny_language_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=raw_tokenizer(["<unk>", "<s>", "</s>", "<pad>", "<image>"], begins="<s>"),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_input_names=["input_ids", "attention_mask"],
    )


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    names = "endoftext im_start im_end vision_start vision_end image_pad video_pad"
    specials = [f"<|{name}|>" for name in names.split()]
    # Before transformers 5 the processors insist on their own class, which since then builds anew.
    old = int(transformers.__version__.partition(".")[0]) < 5
    kind = Qwen2TokenizerFast if old else PreTrainedTokenizerFast
    return kind(
        tokenizer_object=raw_tokenizer(specials, begins=None),
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=WIDTH,
        initializer_range=SPREAD,
        initializer_factor=SPREAD / 0.02,
    )


def _llama_config(tokenizer: PreTrainedTokenizerFast, vocabulary: int | None = None) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=SPREAD,
    )


def qwen_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "text_config": {
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
            "initializer_range": SPREAD,
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        "initializer_range": SPREAD,
    }


def qwen_parts(
    tokenizer: PreTrainedTokenizerFast, *, videos: Any = Qwen2VLVideoProcessor
) -> dict[str, Any]:
    sizes = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 256}
    return {
        "image_processor": Qwen2VLImageProcessor(**sizes),
        "tokenizer": tokenizer,
        "video_processor": videos(**sizes),
    }
