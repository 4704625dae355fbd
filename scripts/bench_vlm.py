"""Image and prompt computed once for both responses of a pair, next to once for each.

    OMP_NUM_THREADS=1 python scripts/bench_vlm.py
    OMP_NUM_THREADS=1 python scripts/bench_vlm.py --only qwen2_5_vl --rounds 9
    python scripts/bench_vlm.py --tiny                      # one round of small models

A step is reference, policy and backward pass of DPO with an adapter, on random weights and tokens;
`model.prefix` is shared in one and repeated in the other, and both take turns in one process, in
reversed order every other round. The models have the image tokens, words and architecture of
LLaVA-1.5 and of Qwen2.5-VL (an image of 602112 pixels), and four layers of width 256. Seconds are
of the CPU, on a GPU of the clock. The ratio, above 1 where sharing is faster, is the median of the
rounds with the smallest and largest. By count is what it would be at 7B: products of a matrix with
tokens in the language model and its head, attention included. Exits if losses differ by more than
1e-5. Prints a Markdown table, then a line of JSON.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from bench_tokens import VIEWS, dpo
from measuring import machine, now, on_this_machine, rounded, spread
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from diffalign.data.batches import TokenBatch, TokenRows
from diffalign.likelihoods.tokens import Tokens
from diffalign.models import lora
from diffalign.models.lora import LoraSettings
from diffalign.models.reference import AdapterOff
from diffalign.models.vlm.families import find_modules
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.models.vlm.token_scores import TokenScorer

PREFIXES = ("shared", "repeated")
IMAGE, START, END, VIDEO = 1, 2, 3, 4
"""Tokens of these models; text has those from 5."""
LAYERS = 4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large a model and its pairs are."""

    words: int
    grid: tuple[int, int]
    """Image tokens down and across."""
    true_size: tuple[int, int, int, int]
    """Hidden size, width of key and value together, inner width, layers of the published model."""


SHAPES = {
    "llava": Shape(words=32_064, grid=(24, 24), true_size=(4096, 8192, 11_008, 32)),
    "qwen2_5_vl": Shape(words=152_064, grid=(24, 32), true_size=(3584, 1024, 18_944, 28)),
}
TEXT, RESPONSES = 64, (128, 96)
"""Tokens of the prompt next to the image, and of both responses."""


def llava(shape: Shape, width: int) -> Any:
    rows, columns = shape.grid
    assert rows == columns, "LLaVA's images are square"
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=14 * rows,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=shape.words,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
        ),
        image_token_index=IMAGE,
    )
    return LlavaForConditionalGeneration(config)


def qwen2_5_vl(shape: Shape, width: int) -> Any:
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": width,
            "num_heads": 2,
            "fullatt_block_indexes": [1],
        },
        text_config={
            "vocab_size": shape.words,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "rope_scaling": {
                "type": "mrope",
                "mrope_section": [width // 32, width // 32, width // 16],
            },
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def build(family: str, shape: Shape, width: int, device: torch.device) -> Any:
    """A model with an adapter that is not zero."""
    torch.manual_seed(0)
    model = {"llava": llava, "qwen2_5_vl": qwen2_5_vl}[family](shape, width)
    model.requires_grad_(False).to(device)
    scope = find_modules(model, where="benchmark").language_scope
    lora.attach(model, LoraSettings(rank=8), scope=scope)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch_of(family: str, shape: Shape, pairs: int, lengths: tuple[int, int]) -> TokenBatch:
    """Random pairs about random images."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = shape.grid
    image = [START, *[IMAGE] * (rows * columns), END]
    text = torch.randint(5, shape.words, (pairs, TEXT), generator=generator)
    prompt = torch.cat([torch.tensor([image] * pairs), text], dim=1)

    def response(length: int) -> TokenRows:
        own = torch.randint(5, shape.words, (pairs, length), generator=generator)
        ids = torch.cat([prompt, own], dim=1)
        further = {"mm_token_type_ids": (ids == IMAGE).long()} if family == "qwen2_5_vl" else {}
        return TokenRows(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            response_mask=(torch.arange(ids.shape[1]) >= prompt.shape[1]).expand(ids.shape),
            further=further,
        )

    if family == "llava":
        sides = (14 * rows, 14 * columns)
        inputs = {"pixel_values": torch.randn(pairs, 3, *sides, generator=generator)}
    else:
        patches = pairs * 4 * rows * columns
        inputs = {
            "pixel_values": torch.randn(patches, 3 * 2 * 14 * 14, generator=generator),
            "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]] * pairs),
        }
    return TokenBatch(
        sample_ids=tuple(map(str, range(pairs))),
        visits=(0,) * pairs,
        views=frozenset(VIEWS),
        responses=dict(zip(VIEWS, map(response, lengths), strict=True)),
        image_inputs={None: inputs},
        image_counts=torch.ones(pairs, dtype=torch.int64),
        weights={},
    )


def wrapped(model: Any, prefix: str, device: torch.device) -> VisionLanguageModel:
    network = TokenScorer(model, find_modules(model, where="benchmark"), positions_at_once=256)
    return VisionLanguageModel(
        network=network,
        reference=AdapterOff(network),
        processor=SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0)),
        device=device,
        compute_dtype=torch.float32,
        shares_vision=True,
        shares_prefix=prefix == "shared",
        rates={},
        fingerprint="",
        export=lambda *_: None,
    )


def step(model: VisionLanguageModel, batch: TokenBatch) -> tuple[float, float, int]:
    """Loss, seconds, and tokens that went through the language model, padding left out."""
    likelihood, started = Tokens(), now()
    prepared = likelihood.prepare(model, batch)
    with torch.no_grad(), model.reference():
        reference = likelihood.evaluate(model, prepared)
    policy = likelihood.evaluate(model, prepared)
    stacked: list[Tensor] = [
        torch.stack([found[view] for view in VIEWS]) for found in (policy, reference)
    ]
    loss = dpo(*stacked)
    loss.backward()
    for _, parameter in model.trained_parameters():
        parameter.grad = None
    tokens = sum(int(rows.attention_mask.sum()) for rows in prepared.groups)
    return loss.item(), now() - started, tokens


def by_count(shape: Shape, lengths: tuple[int, int]) -> float:
    """How many times the products of the published model's language model are fewer."""
    width, key_value, inner, layers = shape.true_size
    weights = layers * (2 * width * width + width * key_value + 3 * width * inner)
    prompt, head = shape.grid[0] * shape.grid[1] + 2 + TEXT, shape.words * width * sum(lengths)

    def products(rows: list[int]) -> float:
        attention = sum(2 * layers * width * row * row for row in rows)
        return weights * sum(rows) + attention + head

    return products([prompt + n for n in lengths]) / products([prompt + sum(lengths)])


def measure(
    family: str, shape: Shape, *, width: int, pairs: int, rounds: int, lengths: tuple[int, int]
) -> dict[str, Any]:
    """Figures of one family."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build(family, shape, width, device)
    batch = batch_of(family, shape, pairs, lengths)
    models = {prefix: wrapped(network, prefix, device) for prefix in PREFIXES}
    first = {prefix: step(model, batch) for prefix, model in models.items()}  # and the comparison
    losses = [loss for loss, _, _ in first.values()]
    if models["shared"].remarks() or abs(losses[0] - losses[1]) > 1e-5:
        raise SystemExit(f"{family}: the losses of shared and repeated rows are {losses}")
    seconds: dict[str, list[float]] = {prefix: [] for prefix in PREFIXES}
    for number in range(rounds):
        for prefix in PREFIXES if number % 2 == 0 else reversed(PREFIXES):
            seconds[prefix].append(step(models[prefix], batch)[1])
    ratios = [r / s for s, r in zip(seconds["shared"], seconds["repeated"], strict=True)]
    return {
        "family": family,
        "words": shape.words,
        "tokens": {prefix: tokens // pairs for prefix, (_, _, tokens) in first.items()},
        "pairs_per_second": {p: rounded(pairs / statistics.median(s)) for p, s in seconds.items()},
        "ratio": spread(ratios),
        "by_count": rounded(by_count(shape, lengths)),
    }


def main(
    only: Annotated[list[str] | None, typer.Option(help="Families; all, if none is given.")] = None,
    rounds: Annotated[int, typer.Option(help="Steps of each.")] = 5,
    pairs: Annotated[int, typer.Option(help="Pairs in a step.")] = 2,
    tiny: Annotated[bool, typer.Option(help="One round of small models.")] = False,
) -> None:
    here, cells = machine(), []
    for family in only or list(SHAPES):
        shape, width, lengths = SHAPES[family], 256, RESPONSES
        if tiny:
            small = Shape(words=200, grid=(4, 4), true_size=shape.true_size)
            shape, width, lengths, rounds, pairs = small, 64, (6, 3), 1, 1
        cells.append(
            measure(family, shape, width=width, pairs=pairs, rounds=rounds, lengths=lengths)
        )
    print("| family | words | tokens a pair | pairs/s | times faster | by count at 7B |")
    print("|---|---|---|---|---|---|")
    for cell in cells:
        pair_of = [
            " / ".join(f"{cell[key][p]:,}" for p in PREFIXES)
            for key in ("tokens", "pairs_per_second")
        ]
        print(
            f"| {cell['family']} | {cell['words']:,} | {pair_of[0]} | {pair_of[1]} | "
            f"{cell['ratio']} | {cell['by_count']} |"
        )
    print(f"\nShared / repeated. {on_this_machine(here)}\n")
    print(json.dumps({"machine": here, "rounds": rounds, "pairs": pairs, "cells": cells}))


if __name__ == "__main__":
    typer.run(main)
