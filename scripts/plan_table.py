"""Print the memory of runs by part, by card, as docs/performance.md has it.

python scripts/plan_table.py [--folder FOLDER] [--resolution 1024] [CARD:SHAPE ...]
python scripts/plan_table.py --responses [--folder FOLDER] [CARD:CONFIG ...] [--set key=value]

SHAPE is lora or full, of SDXL; CONFIG a file of configs/dpo, for LLaVA-1.5-7B and Qwen2.5-VL-7B, as
it is shipped. Without any, the rows of the page. No weights are needed: a folder that holds the
configurations of the model (the facts of its published config.json files) is written.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from diffalign import config
from diffalign.console import silence_libraries
from diffalign.training import presets
from diffalign.training.config import RunConfig
from diffalign.training.memory_plan import GIB, memory_plan, named_gpu
from diffalign.training.response_memory import longest_row

CONFIG = Path(__file__).resolve().parents[1] / "configs/smoke/diffusion_dpo_sdxl.yaml"
ROWS = ("8gb:lora", "12gb:lora", "16gb:lora", "24gb:lora", "80gb:full")
PARTS = (
    "base weights",
    "trained weights",
    "reference copy",
    "text encoders",
    "autoencoder",
    "gradients",
    "optimiser state",
    "activations",
    "overhead",
)

DPO = CONFIG.parents[1] / "dpo"
RESPONSES = (
    "16gb:llava15_7b_qlora_16gb",
    "24gb:llava15_7b",
    "80gb:llava15_7b_full_80gb",
    "16gb:qwen25_vl_7b_qlora_16gb",
    "24gb:qwen25_vl_7b_qlora_24gb",
    "80gb:qwen25_vl_7b_full_80gb",
)
PARTS_OF_RESPONSES = tuple(
    part for part in PARTS if part not in ("reference copy", "text encoders", "autoencoder")
)

_CLIP = {"max_position_embeddings": 77, "vocab_size": 49408}
CONFIGS: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "layers_per_block": 2,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
    },
    "text_encoder/config.json": {
        **_CLIP,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
    },
    "text_encoder_2/config.json": {
        **_CLIP,
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
    },
}


def write_sdxl(folder: Path) -> Path:
    """Write the configurations of SDXL, and no weights."""
    for name, content in CONFIGS.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return folder


VLMS: dict[str, dict[str, Any]] = {
    "llava15": {
        "model_type": "llava",
        "dtype": "float16",
        "image_token_index": 32000,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
    },
    "qwen25": {
        "model_type": "qwen2_5_vl",
        "dtype": "bfloat16",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
}
"""What the name of a config begins with -> the config.json of its model."""


def write_vlm(folder: Path, name: str) -> Path:
    """Write the config.json of the model that a config of responses trains, and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    content = next(known for begins, known in VLMS.items() if name.startswith(begins))
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def row_of_responses(model: Path, card: str, name: str, changes: Sequence[str] = ()) -> str:
    """One line of the table of a shipped config."""
    run = config.load(RunConfig, DPO / f"{name}.yaml", [f"model.path={model}", *changes])
    plan = memory_plan(run, named_gpu(card))
    sizes = plan.parts()
    cells = [f"{sizes.get(part, 0) / GIB:.2f}" for part in PARTS_OF_RESPONSES]
    pairs, tokens = run.training.samples_per_device, longest_row(run)
    fits = "yes" if plan.fits else "no"
    total = f"{plan.total / GIB:.1f} | {fits}"
    return f"| {card} | {name} | {pairs} x {tokens} | {' | '.join(cells)} | {total} |"


def row(model: Path, card: str, shape: str, resolution: int) -> str:
    """One line of the table, with the command's choice."""
    lora = "{rank: 8}" if shape == "lora" else "null"
    given = [
        *(f"preset={card}", f"model.path={model}", f"model.lora={lora}", "model.vae_dtype=fp16"),
        *(f"data.resolution={resolution}", "training={optimizer_steps: 2, accumulation: 16}"),
    ]
    run, choice = presets.load(CONFIG, given)
    plan = choice.plan if choice is not None else memory_plan(run, named_gpu(card))
    sizes = plan.parts()
    cells = [f"{sizes.get(part, 0) / GIB:.2f}" for part in PARTS]
    settings = ", ".join(choice.overrides) if choice is not None else "as given"
    return f"| {card} | {shape} | {' | '.join(cells)} | {plan.total / GIB:.1f} | {settings} |"


def main(
    rows: Annotated[
        list[str] | None, typer.Argument(help="CARD:SHAPE, as 12gb:lora; or CARD:CONFIG.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Of a model; else SDXL is written.")] = None,
    resolution: Annotated[int, typer.Option(help="Side of the images, pixels.")] = 1024,
    responses: Annotated[bool, typer.Option(help="Of vision-language models.")] = False,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of a CONFIG.")
    ] = None,
) -> None:
    """Print the table."""
    silence_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        if responses:
            parts = " | ".join(PARTS_OF_RESPONSES)
            print(f"| card | config | pairs x tokens | {parts} | peak, GiB | fits |")
            print("|" + "---|" * (len(PARTS_OF_RESPONSES) + 5))
            for entry in rows or RESPONSES:
                card, _, name = entry.partition(":")
                vlm = folder or write_vlm(Path(scratch) / name, name)
                print(row_of_responses(vlm, card, name, change or ()), flush=True)
            return
        model = folder or write_sdxl(Path(scratch))
        print(f"| card | trains | {' | '.join(PARTS)} | peak, GiB | chosen |")
        print("|" + "---|" * (len(PARTS) + 4))
        for name in rows or ROWS:
            card, _, shape = name.partition(":")
            print(row(model, card, shape or "lora", resolution), flush=True)


if __name__ == "__main__":
    typer.run(main)
