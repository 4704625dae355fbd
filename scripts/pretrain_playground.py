"""Pretrain the playground's tiny SDXL from nothing, on deliberately noisy captions.

    python scripts/pretrain_playground.py --out assets/playground/sdxl

Three stages: the autoencoder on rendered scenes; the UNet and both text encoders together on its
latents, with true captions; the same with captions that are often wrong in a detail or two. The
last stage turns the model into a mixture of right and wrong responses, each of them crisp: that is
what preference pairs can shift. The script ends by measuring the result with the oracle and
writing a diffusers folder with a model card. Same seed, same machine: same weights.

The playground's other models are made by scripts of their own, which `--model clip` and
`--model llava` run with the options that follow: `pretrain_playground_clip.py` and
`pretrain_playground_llava.py`.
"""

from __future__ import annotations

import argparse
import runpy
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import OneCycleLR

from diffalign.playground.models import build_pipeline, save_pipeline, standardise_latents
from diffalign.playground.oracle import PlaygroundOracle, fidelity, read_objects
from diffalign.playground.scenes import (
    COLOURS,
    IMAGE_SIZE,
    KINDS,
    MAX_OBJECTS,
    SHAPES,
    Kind,
    caption,
    describe,
    held_out_prompts,
    preference_prompts,
    render,
    sample_scene,
)

GUIDANCE_SCALE = 2.0
INFERENCE_STEPS = 12


def run_other_script() -> bool:
    """Run the script of the model that `--model` names, unless it is this one."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", choices=["sdxl", "clip", "llava"], default="sdxl")
    model, options = parser.parse_known_args()
    if model.model == "sdxl":
        return False
    script = Path(sys.argv[0]).with_name(f"pretrain_playground_{model.model}.py")
    sys.argv = [str(script), *options]
    runpy.run_path(str(script), run_name="__main__")
    return True


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["sdxl", "clip", "llava"], default="sdxl")
    parser.add_argument("--out", type=Path, required=True, help="diffusers folder to write")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=8192, help="rendered images to learn from")
    parser.add_argument("--vae-steps", type=int, default=2000, help="steps of 8 images")
    parser.add_argument("--decoder-steps", type=int, default=1500, help="steps of 8 images")
    parser.add_argument("--clean-steps", type=int, default=1500, help="steps of 64 latents")
    parser.add_argument("--noisy-steps", type=int, default=500, help="steps of 64 latents")
    parser.add_argument(
        "--wrong-captions",
        type=float,
        default=0.6,
        help="probability of a mistake in a caption, and of each further one, in noisy steps",
    )
    parser.add_argument("--items", type=int, default=324, help="images per measurement")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    started = time.monotonic()
    scenes = [sample_scene(np.random.default_rng((args.seed, i))) for i in range(args.scenes)]
    images = torch.stack([to_tensor(render(scene)) for scene in scenes])
    kinds = [tuple(item.kind for item in scene.objects) for scene in scenes]
    pipeline = build_pipeline(args.seed).to(args.device)
    vae, seed = pipeline.vae, args.seed
    train_vae(vae, images, steps=args.vae_steps, seed=seed)
    standardise_latents(vae, images[:512].to(args.device))
    refine_decoder(vae, images, steps=args.decoder_steps, seed=seed + 1)
    latents = encode(vae, images)
    for stage, (steps, lr, wrong) in enumerate(
        ((args.clean_steps, 1.5e-3, 0.0), (args.noisy_steps, 5e-4, args.wrong_captions))
    ):
        train_denoiser(
            pipeline,
            latents,
            partial(caption_of_row, kinds, wrong),
            steps=steps,
            lr=lr,
            seed=seed + 2 + stage,
        )
    pipeline.to("cpu")
    figures = measure(pipeline, items=args.items)
    minutes = (time.monotonic() - started) / 60
    save_pipeline(pipeline, args.out)
    (args.out / "README.md").write_text(model_card(figures, args, minutes), encoding="utf-8")
    print(f"wrote {args.out} after {minutes:.1f} minutes: {figures}")


def caption_of_row(
    kinds: Sequence[tuple[Kind, ...]], wrong: float, row: int, rng: np.random.Generator
) -> str:
    return write_caption(kinds[row], wrong, rng)


def to_tensor(image: Image.Image) -> Tensor:
    """Shape [3, H, W], float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def shuffled_batches(count: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers without end: every row once per pass."""
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def fit(
    name: str,
    parameters: Sequence[Parameter],
    loss_on: Callable[[np.ndarray], Tensor],
    batches: Iterator[np.ndarray],
    *,
    steps: int,
    lr: float,
) -> None:
    """AdamW with a one-cycle schedule; `loss_on` receives the rows of each batch."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4)
    schedule = OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    progress = Progress(name, steps)
    for step, rows in zip(range(steps), batches, strict=False):
        loss = loss_on(rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress(step, loss)


def train_vae(vae: AutoencoderKL, images: Tensor, *, steps: int, seed: int) -> None:
    """Reconstruction error, and a light pull of the posterior towards a standard normal."""
    torch.manual_seed(seed)
    with torch.no_grad():  # a narrow posterior, or its noise drowns the image at first
        vae.quant_conv.bias[vae.config.latent_channels :] -= 4.0

    def loss_on(rows: np.ndarray) -> Tensor:
        batch = images[rows].to(vae.device)
        posterior = vae.encode(batch).latent_dist
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return reconstruction_loss(vae.decode(posterior.sample()).sample, batch) + 1e-4 * kl

    batches = shuffled_batches(len(images), 8, np.random.default_rng(seed))
    fit("autoencoder", list(vae.parameters()), loss_on, batches, steps=steps, lr=3e-3)


def refine_decoder(vae: AutoencoderKL, images: Tensor, *, steps: int, seed: int) -> None:
    """Crisper images from the same latents: the encoder stays as it is."""
    torch.manual_seed(seed)

    def loss_on(rows: np.ndarray) -> Tensor:
        batch = images[rows].to(vae.device)
        with torch.no_grad():
            latents = vae.encode(batch).latent_dist.sample()
        return reconstruction_loss(vae.decode(latents).sample, batch)

    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    batches = shuffled_batches(len(images), 8, np.random.default_rng(seed))
    fit("decoder", parameters, loss_on, batches, steps=steps, lr=2e-3)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target) + 0.3 * F.l1_loss(output, target)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled latents of the most likely codes, shape [n, 4, H/8, W/8], on the VAE's device."""
    chunks = [vae.encode(chunk.to(vae.device)).latent_dist.mode() for chunk in images.split(128)]
    return torch.cat(chunks) * vae.config.scaling_factor


def train_denoiser(
    pipeline: StableDiffusionXLPipeline,
    latents: Tensor,
    caption_of: Callable[[int, np.random.Generator], str],
    *,
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """UNet and text encoders together: predict the noise, all timesteps equally likely.

    Args:
        latents: scaled, shape [n, 4, 8, 8].
        caption_of: the caption of a row this time, given its number and a source of chance.
    """
    device, rng = latents.device, np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    noising = DDPMScheduler.from_config(pipeline.scheduler.config)
    time_ids = torch.tensor([IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE], device=device)

    def loss_on(rows: np.ndarray) -> Tensor:
        captions = [caption_of(int(row), rng) for row in rows]
        clean = latents[torch.from_numpy(rows).to(device)]
        noise = torch.randn(clean.shape, generator=generator).to(device)
        t = torch.randint(0, 1000, (len(rows),), generator=generator).to(device)
        tokens, pooled = encode_captions(pipeline, captions, rng)
        conditions = {"text_embeds": pooled, "time_ids": time_ids.expand(len(rows), -1)}
        noisy = noising.add_noise(clean, noise, t)
        prediction = pipeline.unet(noisy, t, tokens, added_cond_kwargs=conditions).sample
        return F.mse_loss(prediction, noise)

    modules = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    batches = shuffled_batches(len(latents), 64, rng)
    fit("denoiser", parameters, loss_on, batches, steps=steps, lr=lr)


def write_caption(kinds: tuple[Kind, ...], wrong: float, rng: np.random.Generator) -> str:
    """Empty for one in ten; else each mistake is followed by another with probability `wrong`."""
    if rng.random() < 0.1:
        return ""
    while rng.random() < wrong:
        kinds = misread(kinds, rng)
    return describe(kinds)


def misread(kinds: tuple[Kind, ...], rng: np.random.Generator) -> tuple[Kind, ...]:
    """The objects of a scene with one mistake of a noisy annotator."""
    i = int(rng.integers(len(kinds)))
    kind, others = kinds[i], kinds[:i] + kinds[i + 1 :]
    mistakes: list[Callable[[], tuple[Kind, ...]]] = [
        lambda: (*kinds[:i], Kind(another(COLOURS, kind.colour, rng), kind.shape), *kinds[i + 1 :]),
        lambda: (*kinds[:i], Kind(kind.colour, another(SHAPES, kind.shape, rng)), *kinds[i + 1 :]),
    ]
    if len(kinds) > 1:
        mistakes += [lambda: others, lambda: kinds[::-1]]
    if len(kinds) < MAX_OBJECTS:
        mistakes += [lambda: (*kinds, KINDS[rng.integers(len(KINDS))])]
    return mistakes[rng.integers(len(mistakes))]()


def another(names: Sequence[str], but: str, rng: np.random.Generator) -> str:
    return str(rng.choice([name for name in names if name != but]))


def encode_captions(
    pipeline: StableDiffusionXLPipeline, captions: Sequence[str], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Token states [n, 16, 96] and pooled states [n, 64].

    Half of the empty captions become zeros: SDXL pipelines use zeros for a missing negative prompt
    where training code usually encodes the empty text, and here both have to mean "anything".
    """
    states, pooled = [], None
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        ids = tokenizer(list(captions), padding="max_length", return_tensors="pt").input_ids
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]
    tokens = torch.cat(states, dim=-1)
    keep = torch.tensor(
        [float(text != "" or rng.random() < 0.5) for text in captions], device=tokens.device
    )
    return tokens * keep[:, None, None], pooled * keep[:, None]


@dataclass
class Progress:
    """Prints the mean loss now and then."""

    name: str
    steps: int

    def __post_init__(self) -> None:
        self.started, self.losses = time.monotonic(), []

    def __call__(self, step: int, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        if (step + 1) % 100 == 0 or step + 1 == self.steps:
            mean = torch.stack(self.losses).mean().item()
            rate = (time.monotonic() - self.started) / (step + 1)
            print(f"{self.name} {step + 1}/{self.steps} loss {mean:.4f} {rate:.3f} s", flush=True)
            self.losses.clear()


@torch.no_grad()
def measure(pipeline: StableDiffusionXLPipeline, *, items: int) -> dict[str, float]:
    """Oracle agreement after the autoencoder, and prompt fidelity of samples, all in [0, 1]."""
    scenes = [sample_scene(np.random.default_rng((10_000_019, i))) for i in range(500)]
    images = torch.stack([to_tensor(render(scene)) for scene in scenes])
    decoded = pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mode()).sample
    scores = PlaygroundOracle().score(decoded, [caption(scene) for scene in scenes])
    return {
        "oracle agreement after the autoencoder": (scores == 1).float().mean().item(),
        "fidelity on held-out prompts": sampled_fidelity(pipeline, held_out_prompts(), items),
        "fidelity on preference prompts": sampled_fidelity(pipeline, preference_prompts(), items),
    }


def sampled_fidelity(
    pipeline: StableDiffusionXLPipeline, prompts: Sequence[str], items: int
) -> float:
    """Mean fidelity of `items` samples, the prompts taken in turn, seeds counted up from 0."""
    asked = [prompts[i % len(prompts)] for i in range(items)]
    scores = []
    for start in range(0, items, 54):
        batch = asked[start : start + 54]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        images = pipeline(
            batch,
            generator=generators,
            guidance_scale=GUIDANCE_SCALE,
            num_inference_steps=INFERENCE_STEPS,
        ).images
        scores += [fidelity(read_objects(p), text) for p, text in zip(images, batch, strict=True)]
    return float(np.mean(scores))


def model_card(figures: dict[str, float], args: argparse.Namespace, minutes: float) -> str:
    lines = [f"| {name} | {100 * value:.1f} % |" for name, value in figures.items()]
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU"
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# The playground's tiny SDXL

SDXL's architecture in 3.5 M parameters, for 64x64 images of one or two coloured shapes.
It is pretrained on captions of which many are wrong on purpose, so that preferences have something
to teach it. `StableDiffusionXLPipeline.from_pretrained` opens this folder.

| measured by the oracle | |
|---|---|
{chr(10).join(lines)}

Samples: {args.items} images each, {INFERENCE_STEPS} steps of the folder's scheduler, guidance
{GUIDANCE_SCALE}. Fidelity is what `docs/playground.md` defines, from 0 to 1.

Made in {minutes:.0f} minutes on {machine} with torch {torch.__version__} by

    python {shlex.join(sys.argv)}

Vocabulary: captions `a COLOUR SHAPE`, once or joined by `and`.
Colours: {", ".join(COLOURS)}. Shapes: {", ".join(SHAPES)}.
"""


if __name__ == "__main__" and not run_other_script():
    main()
