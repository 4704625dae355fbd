"""Randomly initialised models in the shapes of the real ones, small or at their true size.

Small ones keep the architecture, the number of resolutions and, of vision-language models, the true
vocabulary; layers are fewer and narrower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from drill_sdxl import ENCODERS, TINY_ENCODERS, TINY_VAE, VAE, make_model, write_tokenizer

LLAVA = Path(__file__).resolve().parents[1] / "assets/playground/llava"
"""Its tokenizer, processor and chat template serve every vision-language model here."""

_SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
_SMALL_SD15 = {
    **{"sample_size": 8, "block_out_channels": (32, 32, 64, 64), "attention_head_dim": 2},
    "cross_attention_dim": TINY_ENCODERS[0]["hidden_size"],
}
_SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_SMALL_SD3 = {
    **{"sample_size": 8, "num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 4},
    **{"caption_projection_dim": 128, "joint_attention_dim": 64, "pos_embed_max_size": 16},
    "pooled_projection_dim": sum(encoder["projection_dim"] for encoder in TINY_ENCODERS),
}
_LANGUAGE = {  # Vicuna 7B in LLaVA-1.5, and Qwen2.5 7B
    "llava": {
        **{"vocab_size": 32_064, "hidden_size": 4096, "intermediate_size": 11_008},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    },
    "qwen": {
        **{"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944},
        **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
    },
}
_SMALL_LANGUAGE = {
    **{"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 4},
}
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(kind: str, folder: Path, *, true_size: bool) -> Path:
    """Write a model with its tokenizers.

    Args:
        kind: one of `KINDS`.
        folder: created; of true sizes it takes up to 16 GB.
        true_size: in the size of the published one, in half precision.
    """
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    device = "cuda" if true_size and torch.cuda.is_available() else "cpu"
    if true_size:
        torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            KINDS[kind](folder, true_size)
    finally:
        torch.set_default_dtype(dtype)
    return folder


def _sd15(folder: Path, true_size: bool) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    StableDiffusionPipeline(
        vae=_autoencoder(true_size, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(_text(0, true_size)),
        tokenizer=_tokenizer(folder),
        unet=UNet2DConditionModel(**{**_SD15, **({} if true_size else _SMALL_SD15)}),
        scheduler=DDIMScheduler(
            **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
            **{"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _sdxl(folder: Path, true_size: bool) -> None:
    with torch.device("cpu"):
        make_model(folder, tiny=not true_size)


def _sd3(folder: Path, true_size: bool) -> None:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    tokenizer = _tokenizer(folder)
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**{**_SD3, **({} if true_size else _SMALL_SD3)}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(true_size, scaling_factor=1.5305, latent_channels=16, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(_text(0, true_size)),
        text_encoder_2=CLIPTextModelWithProjection(_text(1, true_size)),
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
    ).save_pretrained(folder)


def _autoencoder(true_size: bool, **changes: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**{**VAE, **({} if true_size else TINY_VAE), **changes})


def _text(number: int, true_size: bool) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(**(ENCODERS if true_size else TINY_ENCODERS)[number])


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    write_tokenizer(folder / "tokenizer")
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def _language(kind: str, true_size: bool) -> dict[str, Any]:
    found = {**_LANGUAGE[kind], **({} if true_size else _SMALL_LANGUAGE)}
    return {**found, "max_position_embeddings": 2048}


def _llava(folder: Path, true_size: bool) -> None:
    from transformers import (
        AutoProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    processor = AutoProcessor.from_pretrained(LLAVA)
    tokenizer = processor.tokenizer
    config = LlavaConfig.from_pretrained(LLAVA)
    vision = config.vision_config
    if true_size:
        vision = CLIPVisionConfig(
            **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
            **{"num_attention_heads": 16, "image_size": 336, "patch_size": 14},
        )
        processor.patch_size = 14
        processor.image_processor.size = {"shortest_edge": 336}
        processor.image_processor.crop_size = {"height": 336, "width": 336}
    text = LlamaConfig(
        **_language("llava", true_size),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    whole = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=config.image_token_index
    )
    LlavaForConditionalGeneration(whole).save_pretrained(folder)
    processor.save_pretrained(folder)


def _qwen(folder: Path, true_size: bool) -> None:
    from transformers import (
        AutoProcessor,
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = PreTrainedTokenizerFast(  # without what it knows of LLaVA's images
        tokenizer_object=AutoProcessor.from_pretrained(LLAVA).tokenizer.backend_tokenizer,
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    )
    marks = ("image_pad", "video_pad", "vision_start", "vision_end", "im_start", "im_end")
    tokens = {name: f"<|{name}|>" for name in marks}
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens.values())})
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    width = _language("qwen", true_size)["hidden_size"]
    vision = {
        **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
        **{"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
    }
    if not true_size:
        vision |= {"depth": 4, "hidden_size": 128, "intermediate_size": 512, "num_heads": 4}
        vision |= {"fullatt_block_indexes": [1, 3]}
    heads = _language("qwen", true_size)["num_attention_heads"]
    third = width // heads // 2 // 4
    config = Qwen2_5_VLConfig(
        vision_config={**vision, "out_hidden_size": width},
        text_config={
            **_language("qwen", true_size),
            "rope_scaling": {"type": "mrope", "mrope_section": [2 * third, third, third]},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        **{f"{name}_token_id": ids[name] for name in ("vision_start", "vision_end")},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
    )
    sizes = {"patch_size": 14, "merge_size": 2, "min_pixels": 112**2, "max_pixels": 448**2}
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=_CHATML,
    ).save_pretrained(folder)


KINDS: Mapping[str, Callable[[Path, bool], None]] = {
    "sd15": _sd15,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "llava": _llava,
    "qwen": _qwen,
}
