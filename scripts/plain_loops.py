"""The peers' way, written as plain loops: what bench_peers.py compares with.

Steps of DPO as diffusers' scripts for image pairs and TRL's trainer take them, a loop over a
pipeline of diffusers, and one over `generate` of transformers; and the models, data and sizes that
they share with ours.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import peer_models
import pyarrow.parquet as pq
import torch
from bench_data import write_pairs
from measuring import now
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader

from diffalign.models.devices import DTYPES

ROWS = Path(__file__).resolve().parents[1] / "assets/playground/responses/train.parquet"
RANK = 8
BETA_IMAGES, BETA_RESPONSES = 2000, 0.1
LR = 1e-5
ENCODED_AT_ONCE = 8
GENERATION_STEPS, GUIDANCE = 8, 5.0
NEW_TOKENS = 8
PROMPTS = ("a red fox", "two cats on a table", "a blue house", "snow")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    steps: int
    pairs: int
    """Of a step of images."""
    response_pairs: int
    """Of a step of responses."""
    images: int
    """That are generated."""
    questions: int
    rows: int
    """Of either data set."""


FULL = Sizes(steps=4, pairs=8, response_pairs=4, images=24, questions=48, rows=32)
TINY = Sizes(steps=1, pairs=2, response_pairs=1, images=2, questions=2, rows=4)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all ways share."""

    folder: Path
    sizes: Sizes
    true_size: bool
    trained: dict[str, int] = field(default_factory=dict)
    """Numbers that an adapter of a model has, once one way has been run."""

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def precision(self) -> str:
        return "bf16" if self.true_size else "float32"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def resolution(self, kind: str) -> int:
        return 64 if not self.true_size else 512 if kind == "sd15" else 1024

    def model(self, kind: str) -> Path:
        """Its folder, written where it is not there yet."""
        folder = self.folder / f"model-{kind}"
        if not folder.exists():
            peer_models.write(kind, folder, true_size=self.true_size)
        return folder

    def image_pairs(self, kind: str) -> Path:
        """A folder with a table of pairs of JPEGs."""
        pixels = self.resolution(kind)
        folder = self.folder / f"pairs-{pixels}"
        if not folder.exists():
            folder.mkdir()
            write_pairs(folder / "pairs.parquet", self.sizes.rows, pixels)
        return folder

    @cached_property
    def response_pairs(self) -> Path:
        """A folder with the first pairs of the playground's responses."""
        folder = self.folder / "responses"
        folder.mkdir()
        columns = ["image", "prompt", "chosen", "rejected"]
        table = pq.read_table(ROWS, columns=columns).slice(0, self.sizes.rows)
        pq.write_table(table, folder / "train.parquet")
        return folder

    @cached_property
    def _numbers(self) -> Iterator[int]:
        return count()

    def output(self) -> Path:
        """A new folder."""
        return self.folder / f"out-{next(self._numbers)}"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Yes-or-no questions about images, as POPE has them."""

    file: Path
    images: Path
    rows: list[dict[str, str]]


def questions(bench: Bench) -> Questions:
    """Three questions an image, about the playground's images."""
    folder = bench.folder / "pope"
    asked = Questions(file=folder / "questions.json", images=folder / "images", rows=[])
    table = pq.read_table(ROWS, columns=["image"]).slice(0, -(-bench.sizes.questions // 3))
    asked.images.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(table.to_pylist(), start=1):
        name = f"COCO_val2014_{number:012}.png"
        (asked.images / name).write_bytes(row["image"]["bytes"])
        for thing, label in (("circle", "yes"), ("square", "no"), ("star", "no")):
            text = f"Is there a {thing} in the image?"
            at = {"question_id": str(len(asked.rows)), "image": name, "text": text, "label": label}
            asked.rows.append(at)
    asked.file.write_text("".join(json.dumps(row) + "\n" for row in asked.rows))
    return asked


def dpo(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> tuple[torch.Tensor, ...]:
    """Losses and implicit rewards of rows of which the first half is chosen."""
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)), beta * chosen, beta * rejected


def opened(bench: Bench, kind: str) -> Any:
    """The pipeline of a model, on the device."""
    from diffusers import DiffusionPipeline

    absent = ("text_encoder_3", "tokenizer_3") if kind == "sd3" else ()
    pipeline = DiffusionPipeline.from_pretrained(
        bench.model(kind), torch_dtype=bench.dtype, **dict.fromkeys(absent)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(bench.device)


def plain_images(bench: Bench, kind: str) -> Iterator[tuple[float, int]]:
    """Losses, and how many numbers train, of steps as diffusers' scripts take them: decode,
    tokenise, encode, noise, policy, the same network without its adapter, and four figures read
    back."""
    from diffusers import DDPMScheduler
    from peft import LoraConfig

    pipeline = opened(bench, kind)
    vae, denoiser = pipeline.vae, getattr(pipeline, "transformer", None) or pipeline.unet
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    if kind == "sd3":  # ours adapts both of its streams
        targets += ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"]
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    settings = {"r": RANK, "lora_alpha": RANK, "init_lora_weights": "gaussian"}
    denoiser.add_adapter(LoraConfig(**settings, target_modules=targets))
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=1e-2)
    side = bench.resolution(kind)
    schedule = None if kind == "sd3" else DDPMScheduler.from_config(pipeline.scheduler.config)

    def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, list[str]]:
        sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for row in rows:
            files = (row["jpg_0"], row["jpg_1"])
            for to, file in zip(sides, files if row["label_0"] else files[::-1], strict=True):
                image = Image.open(io.BytesIO(file)).convert("RGB").resize((side, side))
                pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
                to.append(pixels.float() / 127.5 - 1)
        return torch.stack([*sides[0], *sides[1]]), [row["caption"] for row in rows]

    table = pq.read_table(bench.image_pairs(kind)).to_pylist()
    loader = DataLoader(table, batch_size=bench.sizes.pairs, shuffle=True, collate_fn=collate)
    denoiser.train()
    for pixels, captions in cycle_of(loader):
        n = len(captions)
        with torch.no_grad():
            parts = pixels.to(bench.device, vae.dtype).split(ENCODED_AT_ONCE)
            latents = torch.cat([vae.encode(part).latent_dist.sample() for part in parts])
            latents = (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
            told = conditioning(pipeline, kind, captions, side)
        noise = torch.randn_like(latents[:n]).repeat(2, 1, 1, 1)
        if schedule is None:
            share = torch.rand(n, device=bench.device).repeat(2).view(-1, 1, 1, 1)
            noisy, time = (1 - share) * latents + share * noise, 1000 * share.flatten()
            target = noise - latents
        else:
            time = torch.randint(0, 1000, (n,), device=bench.device).repeat(2)
            noisy, target = schedule.add_noise(latents, noise, time), noise

        def log_likelihood(
            noisy: torch.Tensor = noisy,
            time: torch.Tensor = time,
            target: torch.Tensor = target,
            told: dict[str, Any] = told,
        ) -> torch.Tensor:
            with bench.autocast():
                found = denoiser(noisy.to(bench.dtype), timestep=time, **told).sample
            error = F.mse_loss(found.float(), target.float(), reduction="none")
            return -0.5 * error.flatten(1).mean(1)

        policy = log_likelihood()
        denoiser.disable_adapters()
        with torch.no_grad():
            reference = log_likelihood()
        denoiser.enable_adapters()
        losses, chosen, rejected = dpo(policy, reference, BETA_IMAGES)
        loss = losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        figures = (policy.mean(), reference.mean(), (chosen > rejected).float().mean())
        _ = [figure.item() for figure in figures]
        yield loss.item(), count_of(trained)


def count_of(parameters: list[torch.nn.Parameter]) -> int:
    """Numbers in them."""
    return sum(parameter.numel() for parameter in parameters)


def conditioning(pipeline: Any, kind: str, captions: list[str], side: int) -> dict[str, Any]:
    """What the network is told of captions and framing, for both images of each pair."""
    if kind == "sd15":
        told, _ = pipeline.encode_prompt(captions, pipeline.device, 1, False)
        return {"encoder_hidden_states": told.repeat(2, 1, 1)}
    if kind == "sdxl":
        told, _, pooled, _ = pipeline.encode_prompt(
            captions, device=pipeline.device, do_classifier_free_guidance=False
        )
        framing = torch.tensor([[side, side, 0, 0, side, side]] * (2 * len(captions)))
        added = {"text_embeds": pooled.repeat(2, 1), "time_ids": framing.to(pooled)}
        return {"encoder_hidden_states": told.repeat(2, 1, 1), "added_cond_kwargs": added}
    told, _, pooled, _ = pipeline.encode_prompt(
        captions, None, None, device=pipeline.device, do_classifier_free_guidance=False
    )
    return {
        "encoder_hidden_states": told.repeat(2, 1, 1),
        "pooled_projections": pooled.repeat(2, 1),
    }


def cycle_of(loader: Any) -> Iterator[Any]:
    """Its batches, epoch after epoch."""
    for _ in count():
        yield from loader


def plain_responses(bench: Bench, kind: str) -> Iterator[tuple[float, int]]:
    """Losses, and how many numbers train, of steps as TRL's DPO takes them: images and prompts
    processed once for chosen and once for rejected, all logits of both in one forward, the same
    without the adapter, and the figures that it logs in every step."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = bench.model(kind)
    processor = AutoProcessor.from_pretrained(folder)
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=bench.dtype)
    layers = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    adapter = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=rf".*language_model\..*\.({layers})"
    )
    model = get_peft_model(base.to(bench.device), adapter).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    pad = processor.tokenizer.pad_token_id

    def text_of(row: dict[str, Any], side: str) -> str:
        return " ".join(part["text"] for turn in row[side] for part in turn["content"])

    def prompt_of(row: dict[str, Any]) -> str:
        return str(processor.apply_chat_template(row["prompt"], add_generation_prompt=True))

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [[Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")] for row in rows]
        prompts = processor(
            images=images * 2,
            text=[prompt_of(row) for row in rows] * 2,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        texts = [text_of(row, side) for side in ("chosen", "rejected") for row in rows]
        ended = [text + processor.tokenizer.eos_token for text in texts]
        responses = processor.tokenizer(
            ended, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt"
        )
        ids, mask = responses["input_ids"], responses["attention_mask"]
        prompt_mask = prompts["attention_mask"]
        batch = {
            **prompts,
            "input_ids": torch.cat([prompts["input_ids"], ids], 1),
            "attention_mask": torch.cat([prompt_mask, mask], 1),
            "completion": torch.cat([torch.zeros_like(prompt_mask), mask], 1),
        }
        if "mm_token_type_ids" in prompts:
            types = prompts["mm_token_type_ids"]
            batch["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(ids)], 1)
        return flushed_left(batch, pad)

    rows = pq.read_table(bench.response_pairs).to_pylist()
    loader = DataLoader(
        rows, batch_size=bench.sizes.response_pairs, shuffle=True, collate_fn=collate
    )
    for batch in cycle_of(loader):
        given = {key: value.to(bench.device) for key, value in batch.items()}
        wanted = given.pop("completion")[:, 1:]
        labels = given["input_ids"][:, 1:]

        def forward(
            given: dict[str, torch.Tensor] = given,
            labels: torch.Tensor = labels,
            wanted: torch.Tensor = wanted,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            with bench.autocast():
                logits = model(**given, use_cache=False).logits[:, :-1]
            own = logits.gather(-1, labels[..., None])[..., 0]
            log_probs = own - torch.stack([row.logsumexp(-1) for row in logits])
            return (log_probs * wanted).sum(1), logits

        policy, logits = forward()
        with torch.no_grad(), model.disable_adapter():
            reference, _ = forward()
        losses, chosen, rejected = dpo(policy, reference, BETA_RESPONSES)
        loss = losses.mean()
        with torch.no_grad():
            figures = logged(logits.detach(), labels, wanted)
        figures += [chosen.mean(), rejected.mean(), (chosen > rejected).float().mean()]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _ = [figure.item() for figure in figures]
        yield loss.item(), count_of(trained)


def flushed_left(batch: dict[str, torch.Tensor], pad: int) -> dict[str, torch.Tensor]:
    """Rows that begin at the first column, and columns that are padding in all of them cut off."""
    mask = batch["attention_mask"]
    order = mask.argsort(dim=1, descending=True, stable=True)
    longest = int(mask.sum(1).max())
    by_token = ("input_ids", "attention_mask", "completion", "mm_token_type_ids")
    moved = {name: batch[name].gather(1, order)[:, :longest] for name in by_token if name in batch}
    moved["input_ids"] = moved["input_ids"].masked_fill(moved["attention_mask"] == 0, pad)
    return {**batch, **moved}


def logged(logits: torch.Tensor, labels: torch.Tensor, wanted: torch.Tensor) -> list[torch.Tensor]:
    """Entropy, mean logits of either side, and how often the chosen token was the likeliest."""
    entropies = []
    for row in logits:
        log_probs = row.log_softmax(-1)
        entropies.append(-(log_probs.exp() * log_probs).sum(-1))
    entropy = (torch.stack(entropies) * wanted).sum() / wanted.sum()
    means = [
        half[mask.bool()].mean(-1).sum() / mask.sum()
        for half, mask in zip(logits.chunk(2), wanted.chunk(2), strict=True)
    ]
    right = (logits.chunk(2)[0].argmax(-1) == labels.chunk(2)[0]) & wanted.chunk(2)[0].bool()
    return [entropy, *means, right.float().sum()]


def their_images(bench: Bench, kind: str) -> float:
    """Seconds of a loop over the pipeline in batches of four, loading included."""
    side, seeds = bench.resolution(kind), -(-bench.sizes.images // len(PROMPTS))
    output = bench.output()
    output.mkdir()
    started = now()
    pipeline = opened(bench, kind)
    items = [(prompt, seed) for prompt in PROMPTS for seed in range(seeds)]
    for first in range(0, len(items), 4):
        part = items[first : first + 4]
        made = pipeline(
            [prompt for prompt, _ in part],
            num_inference_steps=GENERATION_STEPS,
            guidance_scale=GUIDANCE,
            height=side,
            width=side,
            generator=[torch.Generator().manual_seed(seed) for _, seed in part],
        ).images
        for number, image in enumerate(made, start=first):
            image.save(output / f"{number}.png")
    return now() - started


def their_pope(bench: Bench, kind: str) -> float:
    """Seconds of a loop over `generate`, one question at a time, loading included."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    asked = questions(bench)
    started = now()
    folder = bench.model(kind)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=bench.dtype)
    model.to(bench.device).eval()
    right = 0
    for row in asked.rows:
        content = [{"type": "image"}, {"type": "text", "text": row["text"]}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        image = Image.open(asked.images / row["image"]).convert("RGB")
        inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(bench.device)
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        said = processor.decode(written[0, inputs["input_ids"].shape[1] :])
        right += ("no" in said.lower().split()) == (row["label"] == "no")
    return now() - started
