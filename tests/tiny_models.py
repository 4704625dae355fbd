"""Randomly initialised models with the architecture of the real ones, in some 100 kB each."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WIDTH = 8
TOKENS = 16
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters, digits and punctuation; every word is spelled out."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def _text_config(tokenizer: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": TOKENS,
            "projection_dim": WIDTH,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **changes,
        }
    )


def _t5_tokenizer() -> PreTrainedTokenizerFast:
    """Single characters; a mark at the end, as T5 has it."""
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    pieces = [*special.values(), *string.ascii_lowercase, *string.digits, *string.punctuation]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, " "]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)


def _autoencoder(**changes: Any) -> AutoencoderKL:
    """Factor 8, as the real ones: 32 pixels become 4 latents."""
    settings = {"latent_channels": 4, "scaling_factor": 0.5} | changes
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        sample_size=32,
        **settings,
    )


def _unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(WIDTH, 2 * WIDTH),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        dropout=0.1,  # must make no difference
        **changes,
    )


def write_sd15(
    folder: Path, *, prediction_type: str = "epsilon", hidden_act: str = "quick_gelu"
) -> Path:
    """Write a Stable Diffusion 1.5 pipeline; its schedule is the real one. With the activation
    `gelu` its text encoder is one of OpenCLIP, as that of SD 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = write_tokenizer(folder / "tokenizer")
        pipeline = StableDiffusionPipeline(
            vae=_autoencoder(),
            text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_act=hidden_act)),
            tokenizer=tokenizer,
            unet=_unet(cross_attention_dim=WIDTH),
            scheduler=DDIMScheduler(
                **SCHEDULE,
                clip_sample=False,
                set_alpha_to_one=False,
                prediction_type=prediction_type,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
    return folder


def write_sdxl(
    folder: Path, *, prediction_type: str = "epsilon", second_width: int = WIDTH
) -> Path:
    """Write a Stable Diffusion XL pipeline; velocity comes with zero terminal SNR. Diffusers tells
    the text encoders of a single file by their widths: there the second must differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = write_tokenizer(folder / "tokenizer")
        pipeline = StableDiffusionXLPipeline(
            vae=_autoencoder(),
            text_encoder=CLIPTextModel(_text_config(tokenizer)),
            text_encoder_2=CLIPTextModelWithProjection(
                _text_config(tokenizer, hidden_act="gelu", hidden_size=second_width)
            ),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=_unet(
                cross_attention_dim=WIDTH + second_width,
                addition_embed_type="text_time",
                addition_time_embed_dim=WIDTH,
                projection_class_embeddings_input_dim=WIDTH + 6 * WIDTH,
                transformer_layers_per_block=(1, 2),
                use_linear_projection=True,
            ),
            scheduler=EulerDiscreteScheduler(
                **SCHEDULE,
                prediction_type=prediction_type,
                rescale_betas_zero_snr=prediction_type == "v_prediction",
            ),
        )
        pipeline.save_pretrained(folder)
    return folder


def write_sd3(folder: Path, *, without: tuple[str, ...] = (), **schedule: Any) -> Path:
    """Write a Stable Diffusion 3 pipeline whose parts have other widths than one another, as the
    real ones do.

    Args:
        folder: for it.
        without: text encoders that it lacks, such as `text_encoder_3`.
        schedule: settings of its scheduler in place of a shift of 3.
    """
    second = WIDTH + 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = write_tokenizer(folder / "tokenizer")
        t5 = T5Config(vocab_size=128, d_model=4 * WIDTH, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
        parts = {
            "text_encoder": CLIPTextModelWithProjection(_text_config(tokenizer)),
            "text_encoder_2": CLIPTextModelWithProjection(
                _text_config(
                    tokenizer, hidden_act="gelu", hidden_size=second, projection_dim=second
                )
            ),
            "text_encoder_3": T5EncoderModel(t5).eval(),
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer,
            "tokenizer_3": _t5_tokenizer(),
        }
        for name in without:
            parts |= {name: None, name.replace("text_encoder", "tokenizer"): None}
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=4,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=3,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=4 * WIDTH,
                caption_projection_dim=16,
                pooled_projection_dim=WIDTH + second,
                pos_embed_max_size=8,
                qk_norm="rms_norm",
                dual_attention_layers=(0,),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | schedule)),
            vae=_autoencoder(shift_factor=0.06),
            **parts,
        )
        pipeline.save_pretrained(folder)
    return folder
