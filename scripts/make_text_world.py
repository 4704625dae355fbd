"""Make the playground's world of text: a tiny SDXL that misspells, and pairs of its samples.

    python scripts/make_text_world.py --out assets/playground/text

The model is made as `pretrain_playground.py` makes its own: the autoencoder on rendered words; UNet
and text encoders on prompts that quote what an image shows; the same on prompts that quote the word
that a careless sign painter was asked for. Samples of the finished model are then read by the
scorer `ocr` and paired, best with worst. Same seed, same machine: same weights.
"""

from __future__ import annotations

import argparse
import io
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from make_playground_preferences import as_stored, pair_up, sample, write_pairs
from PIL import Image
from pretrain_playground import (
    GUIDANCE_SCALE,
    INFERENCE_STEPS,
    encode,
    refine_decoder,
    to_tensor,
    train_denoiser,
    train_vae,
)
from torch import Tensor

from diffalign.playground.models import build_pipeline, save_pipeline, standardise_latents
from diffalign.playground.text_images import (
    HELD_OUT_WORDS,
    WORDS,
    paint,
    prompt_of,
    reader,
    render_word,
)

MODEL_NAME = "playground-text"
ALL_WORDS = (*WORDS, *HELD_OUT_WORDS)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signs", type=int, default=8192, help="rendered images to learn from")
    parser.add_argument("--vae-steps", type=int, default=1400, help="steps of 8 images")
    parser.add_argument("--decoder-steps", type=int, default=800, help="steps of 8 images")
    parser.add_argument("--clean-steps", type=int, default=1200, help="steps of 64 latents")
    parser.add_argument("--noisy-steps", type=int, default=400, help="steps of 64 latents")
    parser.add_argument(
        "--mistakes",
        type=float,
        default=0.6,
        help="probability that the sign painter errs, and of each further mistake",
    )
    parser.add_argument("--images", type=int, default=60, help="samples per word, an even number")
    parser.add_argument("--items", type=int, default=8, help="samples per word for the card")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    started = time.monotonic()
    asked = [ALL_WORDS[i % len(ALL_WORDS)] for i in range(args.signs)]
    chances = [np.random.default_rng((args.seed, i)) for i in range(args.signs)]
    shown = [paint(w, rng, mistakes=args.mistakes) for w, rng in zip(asked, chances, strict=True)]
    images = torch.stack(
        [to_tensor(render_word(w, rng)) for w, rng in zip(shown, chances, strict=True)]
    )
    pipeline, seed = build_pipeline(args.seed), args.seed
    vae = pipeline.vae
    train_vae(vae, images, steps=args.vae_steps, seed=seed)
    standardise_latents(vae, images[:512])
    refine_decoder(vae, images, steps=args.decoder_steps, seed=seed + 1)
    figures = {"words read after the autoencoder": read_after(vae, images[:200], shown)}
    print(figures, flush=True)
    latents = encode(vae, images)
    for stage, (steps, lr, words) in enumerate(
        ((args.clean_steps, 1.5e-3, shown), (args.noisy_steps, 5e-4, asked))
    ):
        caption_of = partial(caption_of_row, words)
        train_denoiser(pipeline, latents, caption_of, steps=steps, lr=lr, seed=seed + 2 + stage)
    for name, words in (("words of the pairs", WORDS), ("held-out words", HELD_OUT_WORDS)):
        figures[f"samples read as asked, {name}"] = share_read(pipeline, words, args.items)
    minutes = (time.monotonic() - started) / 60
    save_pipeline(pipeline, args.out / "sdxl")
    card = model_card(figures, args, minutes)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    prompts = [prompt_of(word) for word in WORDS]
    (args.out / "prompts.txt").write_text("\n".join([*prompts, ""]), encoding="utf-8")
    print(f"wrote {args.out} after {minutes:.1f} minutes: {figures}", flush=True)
    write_pairs(make_pairs(pipeline, prompts, args), args.out / "preferences", seed=seed)


def caption_of_row(words: Sequence[str], row: int, rng: np.random.Generator) -> str:
    """The prompt that quotes the row's word; empty for one in ten."""
    return "" if rng.random() < 0.1 else prompt_of(words[row])


@torch.no_grad()
def read_after(vae: torch.nn.Module, images: Tensor, words: Sequence[str]) -> float:
    """Share of images that are read as they should be once they were encoded and decoded."""
    decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample
    prompts = [prompt_of(word) for word in words[: len(images)]]
    return reader(measure="exact").score(decoded, prompts).mean().item()


def share_read(pipeline: StableDiffusionXLPipeline, words: Sequence[str], items: int) -> float:
    """Share of samples, `items` of each word, that are read exactly as asked."""
    scores = []
    for i, word in enumerate(words):
        images = draw_samples(pipeline, prompt_of(word), first=i * items, count=items)
        scores.append(reader(measure="exact").score_images(images, [prompt_of(word)] * items))
    return torch.cat(scores).mean().item()


def draw_samples(
    pipeline: StableDiffusionXLPipeline, prompt: str, *, first: int, count: int
) -> list[Image.Image]:
    settings = argparse.Namespace(
        images=count, inference_steps=INFERENCE_STEPS, guidance_scale=GUIDANCE_SCALE
    )
    return sample(pipeline, prompt, first, settings)


def make_pairs(
    pipeline: StableDiffusionXLPipeline, prompts: Sequence[str], args: argparse.Namespace
) -> list[dict[str, object]]:
    """Pairs of samples, the best of a prompt with the worst; seeds count up from a million."""
    rows: list[dict[str, object]] = []
    for i, prompt in enumerate(prompts):
        first = 1_000_000 + i * args.images
        images = as_stored(draw_samples(pipeline, prompt, first=first, count=args.images))
        seen = [Image.open(io.BytesIO(image)) for image in images]
        scores = reader().score_images(seen, [prompt] * len(seen)).tolist()
        rows += pair_up(prompt, images, scores, model=MODEL_NAME)
    return rows


def model_card(figures: dict[str, float], args: argparse.Namespace, minutes: float) -> str:
    lines = [f"| {name} | {100 * value:.1f} % |" for name, value in figures.items()]
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# The playground's world of text

`sdxl` is a tiny SDXL of 3.5 M parameters for 64x64 images of one word; `preferences` are pairs of
its samples, labelled by the scorer `ocr`; `prompts.txt` asks for the words of these pairs. A prompt
is `{prompt_of(WORDS[0])}`. The model learnt from signs of which many are misspelled on purpose.

| read by the scorer `ocr` | |
|---|---|
{chr(10).join(lines)}

Samples: {args.items} of each word, {INFERENCE_STEPS} steps of the folder's scheduler, guidance
{GUIDANCE_SCALE}.

Made in {minutes:.0f} minutes on the CPU, {torch.get_num_threads()} thread, with torch
{torch.__version__} by

    python {shlex.join(sys.argv)}

Words of the pairs: {", ".join(WORDS)}. Held out: {", ".join(HELD_OUT_WORDS)}.
"""


if __name__ == "__main__":
    main()
