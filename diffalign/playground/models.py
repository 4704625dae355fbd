"""The playground's tiny SDXL: the real architecture with every width cut down.

Nothing here is special-cased elsewhere: the folder under `assets/playground/sdxl` is an ordinary
diffusers folder that `StableDiffusionXLPipeline.from_pretrained` opens. Four departures in size
matter to a reader: latents are 8x8x4, prompts are padded to 16 tokens instead of 77, the UNet has
two levels instead of three, and images are 64x64.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from diffusers.schedulers import EulerDiscreteScheduler
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from diffalign.errors import DataError, DiffalignError, ModelError
from diffalign.models.diffusion.export import restore_prefix
from diffalign.playground.scenes import COLOURS, IMAGE_SIZE, SHAPES

PROMPT_TOKENS = 16
"""Length that prompts are padded to: three objects joined by `and` take 13 tokens."""
SCALING_FACTOR = 0.13025
"""SDXL's own; `standardise_latents` gives the raw latents the matching spread."""

_WIDTH_1, _WIDTH_2 = 32, 64
"""Widths of the two text encoders; the UNet attends to both, side by side."""
_TIME_ID_DIM = 8
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = ("a", "and", *COLOURS, *SHAPES)


def playground_model_path() -> Path:
    """Folder of the shipped tiny SDXL.

    Raises:
        ModelError: the package runs outside a checkout that holds `assets/`.
    """
    return _shipped("sdxl", "model_index.json", "pretrain_playground.py", ModelError)


def playground_preferences_path() -> Path:
    """Folder of the shipped preference pairs, Pick-a-Pic v2 parquet.

    Raises:
        DataError: the package runs outside a checkout that holds `assets/`.
    """
    return _shipped("preferences", "*.parquet", "make_playground_preferences.py", DataError)


def playground_text_path() -> Path:
    """Folder of the shipped world of text: `sdxl`, `preferences` and `prompts.txt`.

    Raises:
        ModelError: the package runs outside a checkout that holds `assets/`.
    """
    return _shipped("text", "sdxl/model_index.json", "make_text_world.py", ModelError)


def playground_clip_path() -> Path:
    """Folder of the shipped tiny CLIP, a plain preference scorer of clean playground images.

    Raises:
        ModelError: the package runs outside a checkout that holds `assets/`.
    """
    return _shipped("clip", "model.safetensors", "pretrain_playground_clip.py", ModelError)


def playground_llava_path() -> Path:
    """Folder of the shipped tiny LLaVA.

    Raises:
        ModelError: the package runs outside a checkout that holds `assets/`.
    """
    return _shipped("llava", "model.safetensors", "pretrain_playground_llava.py", ModelError)


def playground_responses_path() -> Path:
    """Folder of the shipped preferences between responses of the tiny LLaVA.

    Raises:
        DataError: the package runs outside a checkout that holds `assets/`.
    """
    return _shipped("responses", "*.parquet", "make_playground_responses.py", DataError)


def _shipped(name: str, holds: str, script: str, error: type[DiffalignError]) -> Path:
    """A folder of `assets/playground/`, if there is a file of the pattern in it."""
    folder = _assets() / name
    if not any(folder.glob(holds)):
        raise error(
            f"the playground's {name} is not at {folder}: run from a checkout of the repository "
            f"installed with `pip install -e .`, or make it with `python scripts/{script} --out "
            f"{folder}`"
        )
    return folder


def _assets() -> Path:
    return Path(__file__).resolve().parents[2] / "assets" / "playground"


def build_pipeline(seed: int) -> StableDiffusionXLPipeline:
    """The whole tiny SDXL with random weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder_1, encoder_2 = build_text_encoders()
        pipeline = StableDiffusionXLPipeline(
            vae=build_vae(),
            text_encoder=encoder_1,
            text_encoder_2=encoder_2,
            tokenizer=build_tokenizer(pad_token=_END),
            tokenizer_2=build_tokenizer(pad_token="!"),
            unet=build_unet(),
            scheduler=build_scheduler(),  # type: ignore[arg-type]  # annotated with an enum of names
            add_watermarker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_unet() -> UNet2DConditionModel:
    """2.6 M parameters on 8x8x4 latents, epsilon prediction, SDXL's `text_time` conditioning."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_WIDTH_1 + _WIDTH_2,
        attention_head_dim=(2, 4),  # number of heads: diffusers kept the misnomer
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_ID_DIM,
        projection_class_embeddings_input_dim=6 * _TIME_ID_DIM + _WIDTH_2,
    )


def build_vae() -> AutoencoderKL:
    """0.65 M parameters, factor 8, four latent channels."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
        scaling_factor=SCALING_FACTOR,
    )


def build_text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Two CLIP text encoders; as in SDXL the UNet reads the last layer but one of each."""
    vocabulary = _vocabulary()
    config_1 = _text_config(_WIDTH_1, layers=2, vocabulary=vocabulary)
    config_2 = _text_config(_WIDTH_2, layers=3, vocabulary=vocabulary)
    return CLIPTextModel(config_1), CLIPTextModelWithProjection(config_2)


def _text_config(width: int, *, layers: int, vocabulary: dict[str, int]) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=vocabulary[_START],
        eos_token_id=vocabulary[_END],
        pad_token_id=vocabulary[_END],
    )


def build_clip(seed: int) -> CLIPModel:
    """A CLIP of 0.6 M parameters for whole playground images, with random weights."""
    text = _text_config(64, layers=2, vocabulary=_vocabulary())
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=4 * 96,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(config)


def build_tokenizer(*, pad_token: str) -> CLIPTokenizer:
    """A byte-pair tokenizer that spells any text and holds each word of a caption as one token."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        _write_vocabulary(folder)
        return CLIPTokenizer.from_pretrained(
            folder,
            model_max_length=PROMPT_TOKENS,
            bos_token=_START,
            eos_token=_END,
            unk_token=_END,
            pad_token=pad_token,
        )


def _write_vocabulary(folder: Path) -> None:
    merges = [" ".join(pair) for pair in _merges()]
    (folder / "vocab.json").write_text(json.dumps(_vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _vocabulary() -> dict[str, int]:
    """Printable characters inside and at the end of a word, merged pieces, two special tokens."""
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = [*characters, *(character + "</w>" for character in characters)]
    pieces += [left + right for left, right in _merges()]
    return {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, _START, _END]))}


def _merges() -> list[tuple[str, str]]:
    """Byte-pair merges that build every caption word from its letters, left to right.

    Longer words come first, so that `an` inside `triangle` is not merged on behalf of `and`.
    """
    merges: dict[tuple[str, str], None] = {}
    for word in sorted(_WORDS, key=len, reverse=True):
        letters = [*word[:-1], word[-1] + "</w>"]
        grown = letters[0]
        for letter in letters[1:]:
            merges[grown, letter] = None
            grown += letter
    return list(merges)


def build_scheduler() -> EulerDiscreteScheduler:
    """The scheduler of SDXL base: scaled-linear betas, epsilon, leading spacing, offset 1."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type="epsilon",
    )


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Shift and scale each latent channel so that it has mean 0 and std 1 once scaled.

    The change is folded into the two 1x1 convolutions around the latents, so reconstructions stay
    what they were.

    Args:
        images: images to take the statistics from, shape [n, 3, H, W] in [-1, 1].
    """
    latents = vae.encode(images).latent_dist.mean
    mean = latents.mean(dim=(0, 2, 3))
    spread = latents.std(dim=(0, 2, 3)) * SCALING_FACTOR
    channels = len(mean)
    weights = dict(vae.named_parameters())
    into, into_bias = weights["quant_conv.weight"], weights["quant_conv.bias"]
    out_of, out_of_bias = weights["post_quant_conv.weight"], weights["post_quant_conv.bias"]
    into[:channels].div_(spread[:, None, None, None])
    into_bias[:channels].sub_(mean).div_(spread)
    into_bias[channels:].sub_(2 * spread.log())  # the second half holds log-variances
    out_of_bias.add_(out_of[:, :, 0, 0] @ mean)
    out_of.mul_(spread[None, :, None, None])


def save_pipeline(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """Write a diffusers folder in which UNet and autoencoder take half the space, as float16.

    diffusers reads them as float32. The text encoders stay float32, since transformers keeps the
    type that it finds in the file. The pipeline itself is left as it was.
    """
    pipeline.save_pretrained(folder)
    for name, network in (("unet", pipeline.unet), ("vae", pipeline.vae)):
        copy.deepcopy(network).half().save_pretrained(folder / name)
    restore_prefix(folder, pipeline)
    for name in ("tokenizer", "tokenizer_2"):  # transformers 4 does not read tokenizer.json
        _write_vocabulary(folder / name)


def save_clip(clip: CLIPModel, folder: Path) -> None:
    """Write weights as float16, configuration and tokenizer; the model is left as it was."""
    copy.deepcopy(clip).half().save_pretrained(folder)
    build_tokenizer(pad_token=_END).save_pretrained(folder)
    _write_vocabulary(folder)  # transformers 4 does not read tokenizer.json
