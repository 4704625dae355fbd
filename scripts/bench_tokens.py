"""One vision pass and log-probabilities in chunks, next to the plain path: loss, time and memory.

    python scripts/bench_tokens.py --words 32000 --words 152000

Both take one DPO step (reference, policy, backward pass) of the same randomly initialised LLaVA on
the same pairs, each in a process of its own. The plain path is what most trainers do: the model as
transformers gives it, chosen and rejected in one batch, a log-softmax over all logits in float32,
and the vision tower in every forward. Memory is the peak of the device, or on the CPU that of the
process, less what it was before the step.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from diffalign.data.batches import TokenBatch, TokenRows
from diffalign.likelihoods.tokens import Tokens
from diffalign.models import lora
from diffalign.models.lora import LoraSettings
from diffalign.models.reference import AdapterOff
from diffalign.models.vlm.families import find_modules
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.models.vlm.token_scores import TokenScorer

BETA = 0.1
IMAGE_TOKEN = 1
IMAGE_TOKENS, PROMPT_TOKENS, RESPONSE_TOKENS = 144, 32, 128
PIXELS, PATCH = 168, 14
VIEWS = ("chosen", "rejected")

Path = Literal["plain", "ours"]


def build(words: int, width: int, device: torch.device) -> LlavaForConditionalGeneration:
    """A LLaVA of four layers with an adapter that is not zero."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=12,
            num_attention_heads=8,
            image_size=PIXELS,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=4,
            num_attention_heads=8,
        ),
        image_token_index=IMAGE_TOKEN,
    )
    model = LlavaForConditionalGeneration(config).requires_grad_(False).to(device)
    settings = LoraSettings(rank=8)
    lora.attach(model, settings, scope=find_modules(model, where="benchmark").language_scope)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch_of(pairs: int, words: int) -> TokenBatch:
    """Random tokens; the second response is half as long."""
    generator = torch.Generator().manual_seed(1)

    def rows(length: int) -> TokenRows:
        prompt = IMAGE_TOKENS + PROMPT_TOKENS
        ids = torch.randint(2, words, (pairs, prompt + length), generator=generator)
        ids[:, :IMAGE_TOKENS] = IMAGE_TOKEN
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        mask[:, prompt:] = True
        return TokenRows(
            input_ids=ids, attention_mask=torch.ones_like(ids), response_mask=mask, further={}
        )

    pixels = torch.randn(pairs, 3, PIXELS, PIXELS, generator=generator)
    return TokenBatch(
        sample_ids=tuple(map(str, range(pairs))),
        visits=(0,) * pairs,
        views=frozenset(VIEWS),
        responses={"chosen": rows(RESPONSE_TOKENS), "rejected": rows(RESPONSE_TOKENS // 2)},
        image_inputs={None: {"pixel_values": pixels}},
        image_counts=torch.ones(pairs, dtype=torch.int64),
        weights={},
    )


def dpo(policy: Tensor, reference: Tensor) -> Tensor:
    """Mean loss; both [2, pairs], chosen first."""
    ratio = policy - reference
    return -logsigmoid(BETA * (ratio[0] - ratio[1])).mean()


def ours(model: LlavaForConditionalGeneration, batch: TokenBatch) -> Tensor:
    device = model.lm_head.weight.device
    network = TokenScorer(model, find_modules(model, where="benchmark"), positions_at_once=256)
    trained = VisionLanguageModel(
        network=network,
        reference=AdapterOff(network),
        processor=SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0)),
        device=device,
        compute_dtype=torch.float32,
        shares_vision=True,
        rates={},
        fingerprint="",
        export=lambda *_: None,
    )
    likelihood = Tokens()
    prepared = likelihood.prepare(trained, batch)
    with torch.no_grad(), trained.reference():
        reference = likelihood.evaluate(trained, prepared)
    policy = likelihood.evaluate(trained, prepared)
    return dpo(*(torch.stack([found[view] for view in VIEWS]) for found in (policy, reference)))


def plain(model: LlavaForConditionalGeneration, batch: TokenBatch) -> Tensor:
    device = model.lm_head.weight.device
    rows = [batch.responses[view] for view in VIEWS]
    longest = max(row.input_ids.shape[1] for row in rows)

    def padded(tensors: list[Tensor]) -> Tensor:
        filled = [torch.nn.functional.pad(t, (0, longest - t.shape[1])) for t in tensors]
        return torch.cat(filled).to(device)

    ids, attention = padded([r.input_ids for r in rows]), padded([r.attention_mask for r in rows])
    mask = padded([r.response_mask for r in rows])[:, 1:]
    pixels = batch.image_inputs[None]["pixel_values"].repeat(2, 1, 1, 1).to(device)

    def sums() -> Tensor:
        logits = model(input_ids=ids, attention_mask=attention, pixel_values=pixels).logits
        log_probs = logits[:, :-1].float().log_softmax(-1)
        own = log_probs.gather(-1, ids[:, 1:, None])[..., 0]
        return (own * mask).sum(1).view(2, -1)

    with torch.no_grad(), lora.disabled(lora.adapter_layers(model)):
        reference = sums()
    return dpo(sums(), reference)


def measure(path: Path, words: int, pairs: int, width: int) -> str:
    """One cell, as JSON: loss, norm of the gradient, seconds of a step, MiB."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    model = build(words, width, device).train()
    batch = batch_of(pairs, words)
    step: Callable[..., Tensor] = {"plain": plain, "ours": ours}[path]
    if device.type == "cuda":  # kernels are chosen, and libraries loaded, in a first step
        step(model, batch).backward()
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = occupied(device)
    started = time.perf_counter()
    loss = step(model, batch)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return json.dumps(
        {
            "loss": loss.item(),
            "gradient": gradient.norm().item(),
            "seconds": seconds,
            "mib": peak(device) - before,
        }
    )


def occupied(device: torch.device) -> float:
    """MiB that are in use before the step."""
    return torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else peak(device)


def peak(device: torch.device) -> float:
    """Most MiB that were ever in use."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(
    words: Annotated[list[int] | None, typer.Option(help="Sizes of the vocabulary.")] = None,
    pairs: Annotated[int, typer.Option(help="Pairs in a step.")] = 2,
    width: Annotated[int, typer.Option(help="Hidden size of tower and language model.")] = 256,
) -> None:
    table = Table("words", "path", "loss", "gradient", "seconds", "peak MiB")
    for size in words or [32_000, 152_000]:
        losses = []
        for path in ("plain", "ours"):
            with multiprocessing.get_context("forkserver").Pool(1) as pool:
                cell = json.loads(pool.apply(measure, (path, size, pairs, width)))
            losses.append(cell["loss"])
            table.add_row(
                f"{size:,}",
                path,
                f"{cell['loss']:.7f}",
                f"{cell['gradient']:.6f}",
                f"{cell['seconds']:.2f}",
                f"{cell['mib']:,.0f}",
            )
        if abs(losses[0] - losses[1]) > 1e-5:
            raise SystemExit(f"the losses at {size} words differ by more than 1e-5: {losses}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
