"""Make the playground's preference pairs from the pretrained model's own samples.

    python scripts/make_playground_preferences.py --out assets/playground/preferences

Every prompt without a held-out combination gets `--images` samples. The oracle ranks them, the best
meets the worst, the second best the second worst, and so on; equal scores make a tie. The rows have
the columns of Pick-a-Pic v2, so the ordinary reader opens them. `--held-out` takes the other
prompts instead: pairs to measure on, never to train on.
"""

from __future__ import annotations

import argparse
import io
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from diffalign.playground.models import playground_model_path
from diffalign.playground.oracle import fidelity, read_objects
from diffalign.playground.scenes import held_out_prompts, preference_prompts

MODEL_NAME = "playground-sdxl"

SCHEMA = pa.schema(
    {
        "are_different": pa.bool_(),
        "best_image_uid": pa.string(),
        "caption": pa.string(),
        "created_at": pa.timestamp("ns"),
        "has_label": pa.bool_(),
        "image_0_uid": pa.string(),
        "image_0_url": pa.string(),
        "image_1_uid": pa.string(),
        "image_1_url": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "model_0": pa.string(),
        "model_1": pa.string(),
        "ranking_id": pa.int64(),
        "user_id": pa.int64(),
        "num_example_per_prompt": pa.int64(),
        "__index_level_0__": pa.int64(),
    }
)
"""Columns and types of Pick-a-Pic v2."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet")
    parser.add_argument("--model", type=Path, help="diffusers folder; default: the shipped model")
    parser.add_argument("--images", type=int, default=10, help="samples per prompt, an even number")
    parser.add_argument("--inference-steps", type=int, default=12)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--held-out", action="store_true", help="the held-out prompts instead")
    parser.add_argument("--prompts", type=int, help="only the first so many prompts, for a trial")
    parser.add_argument("--seed", type=int, default=1_000_000, help="seed of the first sample")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    pipeline = StableDiffusionXLPipeline.from_pretrained(args.model or playground_model_path())
    pipeline.set_progress_bar_config(disable=True)
    prompts = (held_out_prompts() if args.held_out else preference_prompts())[: args.prompts]
    rows = []
    for i, prompt in enumerate(prompts):
        images = as_stored(sample(pipeline, prompt, args.seed + i * args.images, args))
        shown = [read_objects(Image.open(io.BytesIO(image))) for image in images]
        scores = [fidelity(objects, prompt) for objects in shown]
        rows += pair_up(prompt, images, scores, model=MODEL_NAME)
        if (i + 1) % 20 == 0 or i + 1 == len(prompts):
            print(f"{i + 1}/{len(prompts)} prompts, {len(rows)} pairs", flush=True)
    write_pairs(rows, args.out, seed=args.seed)


def write_pairs(rows: list[dict[str, object]], folder: Path, *, seed: int) -> None:
    """Write shuffled rows as `train.parquet`, and say what is in it."""
    np.random.default_rng(seed).shuffle(rows)
    for i, row in enumerate(rows):
        row["ranking_id"] = row["__index_level_0__"] = i
        row["created_at"] = datetime(2024, 1, 1) + timedelta(seconds=i)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), target, compression="zstd")
    ties = sum(row["label_0"] == 0.5 for row in rows)
    size = target.stat().st_size / 1e6
    print(f"wrote {target}: {len(rows) - ties} decided pairs, {ties} ties, {size:.1f} MB")


@torch.no_grad()
def sample(
    pipeline: StableDiffusionXLPipeline, prompt: str, seed: int, args: argparse.Namespace
) -> list[Image.Image]:
    return pipeline(
        [prompt] * args.images,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(args.images)],
        num_inference_steps=args.inference_steps,
        guidance_scale=args.guidance_scale,
    ).images


def as_stored(images: Sequence[Image.Image]) -> list[bytes]:
    """JPEG bytes; scores are of what they decode to, so labels are true of the stored pair."""
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=95)
        encoded.append(buffer.getvalue())
    return encoded


def pair_up(
    prompt: str, images: Sequence[bytes], scores: Sequence[float], *, model: str
) -> Iterator[dict[str, object]]:
    """Best with worst, second best with second worst, ...; the sides in no particular order."""
    order = np.argsort(scores, kind="stable")
    names = [str(uuid.uuid5(uuid.NAMESPACE_URL, f"{prompt} {i}")) for i in range(len(images))]
    for low, high in zip(order, order[::-1][: len(order) // 2], strict=False):
        left, right = (high, low) if int(names[high][:8], 16) % 2 else (low, high)
        label = 0.5 + 0.5 * float(np.sign(scores[left] - scores[right]))
        yield {
            "are_different": images[left] != images[right],
            "best_image_uid": {1.0: names[left], 0.0: names[right]}.get(label, ""),
            "caption": prompt,
            "has_label": True,
            "image_0_uid": names[left],
            "image_0_url": "",
            "image_1_uid": names[right],
            "image_1_url": "",
            "jpg_0": images[left],
            "jpg_1": images[right],
            "label_0": label,
            "label_1": 1.0 - label,
            "model_0": model,
            "model_1": model,
            "user_id": 0,
            "num_example_per_prompt": len(images) // 2,
        }


if __name__ == "__main__":
    main()
