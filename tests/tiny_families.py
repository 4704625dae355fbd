"""Randomly initialised models of every family that `docs/models.md` lists, of some 100 kB each.

Their layers with a window or chunks see fewer tokens than a prompt has, and image blocks are within
those. Families that the installed transformers does not have are left out of `FAMILIES`, and
PaliGemma where its processor cannot be kept from changing text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from tests.tiny_vlm import (
    CHATML_TEMPLATE,
    LLAVA_TEMPLATE,
    MISTRAL_TEMPLATE,
    SPREAD,
    WIDTH,
    clip_config,
    qwen_parts,
    qwen_settings,
    qwen_tokenizer,
    raw_tokenizer,
    tiny_llava,
    tiny_llava_next,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
    write_model,
)

WINDOW = 20
"""Tokens that layers with a window see; chunks are as long. PaliGemma's prompts are shorter."""
_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": SPREAD,
}
_TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": SPREAD,
}
_PALIGEMMA_TEMPLATE = (
    "{% for message in messages if message['role'] == 'user' %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{{ '<s>' }}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '\n' }}{% endfor %}"
    "{% for message in messages if message['role'] == 'assistant' %}"
    "{{ message['content'][0]['text'] + '</s>' }}{% endfor %}"
)
"""What PaliGemma was trained on: images, begin of sequence, question, line break, response."""
_TURNS = (
    "{{ '<s>' }}{% for message in messages %}"
    "{{ '<turn>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'MARKER' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)
"""Images where they stand, as Gemma 3's, Idefics3's, InternVL's and Llama 4's."""


def _tokenizer(*specials: str, **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer with further special tokens, some of them under a name."""
    own = ["<unk>", "<s>", "</s>", "<pad>", "<turn>", "<end>", *specials, *named.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw_tokenizer(list(dict.fromkeys(own)), begins="<s>"),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=named,
        model_input_names=["input_ids", "attention_mask"],
    )


def _text(tokenizer: PreTrainedTokenizerFast, model_type: str, **further: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        **_SIZES,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **further,
    }


def _siglip(**changes: Any) -> dict[str, Any]:
    return {**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False, **changes}


def _write(folder: Path, family: str, config: dict[str, Any], processor: Any) -> Path:
    made = getattr(transformers, f"{family}Config")(**config, initializer_range=SPREAD)
    kind = getattr(transformers, f"{family}ForConditionalGeneration")
    return write_model(folder, kind, made, processor)


def llava_mistral(folder: Path) -> Path:
    """A LLaVA whose language model is a Mistral with a window."""
    tokenizer = _tokenizer(image_token="<image>")
    config = {
        "vision_config": clip_config().to_dict(),
        "text_config": _text(tokenizer, "mistral", sliding_window=WINDOW),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
    }
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_convert_rgb=True
        ),
        tokenizer,
        chat_template=LLAVA_TEMPLATE,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return _write(folder, "Llava", config, processor)


def llava_onevision(folder: Path) -> Path:
    tokenizer = _tokenizer(image_token="<image>", video_token="<video>")
    grid = [[8, 16], [16, 8], [16, 16]]
    config = {
        "vision_config": _siglip(),
        "text_config": _text(tokenizer, "qwen2"),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "video_token_index": tokenizer.convert_tokens_to_ids("<video>"),
        "image_grid_pinpoints": grid,
    }
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(
            size={"height": 8, "width": 8}, image_grid_pinpoints=grid
        ),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size={"height": 8, "width": 8}),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=_TURNS.replace("MARKER", "<image>"),
    )
    return _write(folder, "LlavaOnevision", config, processor)


def _qwen3_tower(**changes: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "out_hidden_size": WIDTH,
        "num_heads": 2,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "initializer_range": SPREAD,
        **changes,
    }


def _qwen3(folder: Path, family: str, text: dict[str, Any], tower: dict[str, Any]) -> Path:
    tokenizer = qwen_tokenizer()
    settings = qwen_settings(tokenizer)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    own = {
        "head_dim": 8,
        "rope_scaling": {**rope, "mrope_interleaved": True},
        "tie_word_embeddings": False,
    }
    known = settings.pop("text_config")
    settings.pop("initializer_range")
    config = {
        **settings,
        "text_config": {**known, **own, **text},
        "vision_config": tower,
        "tie_word_embeddings": False,
    }
    processor = transformers.Qwen3VLProcessor(
        **qwen_parts(tokenizer, videos=transformers.Qwen3VLVideoProcessor),
        chat_template=CHATML_TEMPLATE,
    )
    return _write(folder, family, config, processor)


def qwen3_vl(folder: Path) -> Path:
    """A Qwen3-VL whose first layers get features of inner layers of the tower as well."""
    return _qwen3(folder, "Qwen3VL", {}, _qwen3_tower(deepstack_visual_indexes=[0, 1]))


def qwen3_vl_moe(folder: Path) -> Path:
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
    tower = _qwen3_tower(deepstack_visual_indexes=[0])
    return _qwen3(folder, "Qwen3VLMoe", experts, tower)


def qwen3_5(folder: Path) -> Path:
    """A Qwen3.5: one layer of linear attention and one of full attention."""
    text = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "partial_rotary_factor": 1.0,
    }
    return _qwen3(folder, "Qwen3_5", text, _qwen3_tower())


def internvl(folder: Path) -> Path:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(**names)
    config = {
        "vision_config": {**_TOWER, "image_size": [16, 16], "layer_scale_init_value": 1.0},
        "text_config": _text(tokenizer, "qwen2"),
        "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        "image_seq_length": 4,
        "tie_word_embeddings": False,
    }
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(
            size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=3
        ),
        tokenizer,
        transformers.InternVLVideoProcessor(size={"height": 16, "width": 16}),
        image_seq_length=4,
        chat_template=_TURNS.replace("MARKER", "<IMG_CONTEXT>\n"),
    )
    return _write(folder, "InternVL", config, processor)


def gemma3(folder: Path) -> Path:
    """A Gemma 3 with one layer that sees a window and one that sees all."""
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"}
    tokenizer = _tokenizer(**names)
    config = {
        "vision_config": _siglip(),
        "text_config": _text(
            tokenizer,
            "gemma3_text",
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "mm_tokens_per_image": 4,
        "image_token_index": tokenizer.convert_tokens_to_ids("<soft>"),
        "boi_token_index": tokenizer.convert_tokens_to_ids("<boi>"),
        "eoi_token_index": tokenizer.convert_tokens_to_ids("<eoi>"),
    }
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size={"height": 8, "width": 8}, do_convert_rgb=True),
        tokenizer,
        image_seq_length=4,
        chat_template=_TURNS.replace("MARKER", "<boi>"),
    )
    return _write(folder, "Gemma3", config, processor)


def _idefics3(folder: Path, family: str) -> Path:
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)]
    extra = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *rows]
    tokenizer = _tokenizer(*extra, image_token="<image>")
    config = {
        "vision_config": {**_TOWER, "image_size": 16, "patch_size": 4},
        "text_config": _text(tokenizer, "llama"),
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "scale_factor": 2,
    }
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
        ),
        tokenizer,
        image_seq_len=4,
        chat_template=_TURNS.replace("MARKER", "<image>"),
    )
    return _write(folder, family, config, processor)


def idefics3(folder: Path) -> Path:
    return _idefics3(folder, "Idefics3")


def smolvlm(folder: Path) -> Path:
    """A SmolVLM; its own processor needs a package that Idefics3's does without."""
    return _idefics3(folder, "SmolVLM")


def mistral3(folder: Path) -> Path:
    """A Mistral 3 whose language model has a window."""
    tokenizer = _tokenizer("[IMG_BREAK]", "[IMG_END]", image_token="[IMG]")
    config = {
        "vision_config": {**_TOWER, "model_type": "pixtral", "image_size": 32, "head_dim": 8},
        "text_config": _text(tokenizer, "mistral", head_dim=8, sliding_window=WINDOW),
        "image_token_index": tokenizer.convert_tokens_to_ids("[IMG]"),
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }
    processor = transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": 24}, patch_size=4),
        tokenizer,
        patch_size=4,
        spatial_merge_size=2,
        chat_template=MISTRAL_TEMPLATE.replace("<image>", "[IMG]"),
    )
    return _write(folder, "Mistral3", config, processor)


def llama4(folder: Path) -> Path:
    """A Llama 4: dense and with experts, with chunks and without positions."""
    names = ["image_start", "image_end", "tile_x_separator", "tile_y_separator", "patch"]
    tokenizer = _tokenizer(*[f"<|{name}|>" for name in names], image_token="<|image|>")
    config = {
        "vision_config": {
            **_TOWER,
            "intermediate_size": 4 * WIDTH,
            "image_size": 16,
            "vision_output_dim": WIDTH,
            "projector_input_dim": WIDTH,
            "projector_output_dim": WIDTH,
        },
        "text_config": _text(
            tokenizer,
            "llama4_text",
            head_dim=8,
            intermediate_size_mlp=2 * WIDTH,
            num_local_experts=2,
            interleave_moe_layer_step=2,
            no_rope_layers=[1, 0],
            attention_chunk_size=WINDOW,
        ),
        "image_token_index": tokenizer.convert_tokens_to_ids("<|patch|>"),
        "boi_token_index": tokenizer.convert_tokens_to_ids("<|image_start|>"),
        "eoi_token_index": tokenizer.convert_tokens_to_ids("<|image_end|>"),
    }
    kind = "Llama4ImageProcessor"
    images = getattr(transformers, kind if hasattr(transformers, kind) else f"{kind}Fast")
    processor = transformers.Llama4Processor(
        images(size={"height": 16, "width": 16}, max_patches=3),
        tokenizer,
        patch_size=4,
        chat_template=_TURNS.replace("MARKER", "<|image|>"),
    )
    return _write(folder, "Llama4", config, processor)


def _paligemma(folder: Path, model_type: str, **text: Any) -> Path:
    tokenizer = _tokenizer(image_token="<image>")
    sizes = {"image_seq_length": 4, "size": {"height": 8, "width": 8}}
    processor = transformers.PaliGemmaProcessor(
        transformers.SiglipImageProcessor(**sizes, do_convert_rgb=True),
        tokenizer,
        chat_template=_PALIGEMMA_TEMPLATE,
    )
    config = {
        "vision_config": _siglip(),
        "text_config": _text(processor.tokenizer, model_type, head_dim=8, **text),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "projection_dim": WIDTH,
        "hidden_size": WIDTH,
    }
    return _write(folder, "PaliGemma", config, processor)


def paligemma(folder: Path) -> Path:
    return _paligemma(folder, "gemma")


def paligemma2(folder: Path) -> Path:
    """A PaliGemma 2, whose language model bounds its scores and its logits."""
    return _paligemma(
        folder,
        "gemma2",
        query_pre_attn_scalar=8,
        sliding_window=WINDOW // 2,
        layer_types=["sliding_attention", "full_attention"],
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    )


_BUILDERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "llava": ("Llava", tiny_llava),
    "llava_mistral": ("Llava", llava_mistral),
    "llava_next": ("LlavaNext", tiny_llava_next),
    "llava_onevision": ("LlavaOnevision", llava_onevision),
    "qwen2_vl": ("Qwen2VL", tiny_qwen2_vl),
    "qwen2_5_vl": ("Qwen2_5_VL", tiny_qwen2_5_vl),
    "qwen3_vl": ("Qwen3VL", qwen3_vl),
    "qwen3_vl_moe": ("Qwen3VLMoe", qwen3_vl_moe),
    "qwen3_5": ("Qwen3_5", qwen3_5),
    "internvl": ("InternVL", internvl),
    "gemma3": ("Gemma3", gemma3),
    "idefics3": ("Idefics3", idefics3),
    "smolvlm": ("SmolVLM", smolvlm),
    "mistral3": ("Mistral3", mistral3),
    "llama4": ("Llama4", llama4),
    "paligemma": ("PaliGemma", paligemma),
    "paligemma2": ("PaliGemma", paligemma2),
}
FAMILIES = {
    name: build
    for name, (kind, build) in _BUILDERS.items()
    if hasattr(transformers, f"{kind}ForConditionalGeneration")
    and (kind != "PaliGemma" or hasattr(ProcessorMixin, "prepare_inputs_layout"))
}
