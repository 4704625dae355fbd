"""The playground's tiny LLaVA: LLaVA-1.5's architecture with every width cut down.

Nothing here is special-cased elsewhere: the folder under `assets/playground/llava` is an ordinary
one, which `AutoModelForImageTextToText` and `AutoProcessor` open. An image of 64 pixels is 16
tokens, and every word of a response is one token; other text is spelled, byte by byte.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from diffalign.models.vlm.export import write_processor
from diffalign.playground.scenes import COLOURS, IMAGE_SIZE, SHAPES

PATCH_SIZE = 16
CONTEXT = 512
"""Positions of the language model: two dozen images, or some hundred words."""

_SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
_SPACE = "Ġ"
"""How a byte-level tokenizer writes a space, which belongs to the word after it."""
_FIRST_WORDS = ("USER", "Describe", "Is", "What", "There", "The", "Yes", "No")
"""These begin a text or a line too."""
_WORDS = (
    *_FIRST_WORDS,
    *COLOURS,
    *SHAPES,
    *("ASSISTANT", "a", "the", "in", "is", "there", "what", "colour", "shape", "object", "picture"),
)
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As LLaVA-1.5's: images first, a space after every turn, no end of sequence."""


def build_llava(seed: int) -> LlavaForConditionalGeneration:
    """1.4 M parameters with random weights, the same for the same seed."""
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=4 * 128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=3 * 128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config)


_TOWER, _RELEASED = "vision_tower.", "vision_tower.vision_model."


def build_processor() -> LlavaProcessor:
    """Images, text and the chat template of `build_llava`'s model."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side, do_convert_rgb=True),
        build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that spells any text and holds each word of a response, with the space
    before it, as one token."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges()
    pieces = [*_SPECIALS, *bytes_, *(left + right for left, right in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(token_models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],  # or transformers 4 adds types of tokens
        clean_up_tokenization_spaces=False,
    )


def _merges() -> list[tuple[str, str]]:
    """Byte-pair merges that build every word from its letters, left to right.

    A chain begins with a space or, in `_FIRST_WORDS`, with a capital letter, neither of which
    is inside a word; those with a space come first, so that they take their capital.
    """
    merges: dict[tuple[str, str], None] = {}
    for word in (*(_SPACE + word for word in _WORDS), *_FIRST_WORDS):
        grown = word[0]
        for letter in word[1:]:
            merges[grown, letter] = None
            grown += letter
    return list(merges)


def save_llava(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write weights as float32, configuration, processor and chat template.

    Weights are called as in the releases of LLaVA, which transformers 4 and 5 both read: what
    transformers 5 writes by itself leaves out a part of the tower's names, and transformers 4 then
    begins with a random tower.
    """
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = {
        name if name.startswith(f"{_TOWER}vision_model.") else name.replace(_TOWER, _RELEASED, 1): w
        for name, w in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    write_processor(folder, build_processor())
