"""Steps cut as samples come, by length, and with rows packed: padding, time, and what it is at 7B.

    OMP_NUM_THREADS=1 python scripts/bench_packing.py
    python scripts/bench_packing.py --tiny                  # one round of small models

A step is reference, policy and backward pass of DPO with an adapter on pairs with random tokens,
`model.prefix` shared. Responses are log-normal in length (median 100 tokens, 0.6 the standard
deviation of the logarithm, 8 to 600), prompts have 30 to 60 tokens next to their image: 576 tokens
of LLaVA, 64 to 1,024 of Qwen2.5-VL. *As they come* takes four at a time; by length, no forward pass
has more tokens than the largest of those, so that they fit the same memory. Padding, passes and
what is by count are means over 32 steps of 32 pairs, without a model; steps of 8 are timed, seconds
as in bench_vlm.py, on models of width 256. Times faster is the median of the rounds. By count is
what it would be at 7B: products of a matrix with tokens, those of padding included, and attention
as these families compute it: of every row the causal half of what its responses have in common with
the first of them, and a rectangle for the rest of the second. Under a mask is the same for a family
whose layers take one: attention of all tokens of a sequence, padding included, with all others.
Exits if losses differ by more than 1e-5. Prints a Markdown table, then a line of JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from bench_tokens import VIEWS, dpo
from bench_vlm import END, IMAGE, SHAPES, START, Shape, build, wrapped
from measuring import machine, now, on_this_machine, rounded, spread

from diffalign.data.batches import TokenBatch
from diffalign.data.responses.chat import EncodedResponse
from diffalign.data.responses.micro_batches import MicroBatches, ModelRows, row_lengths
from diffalign.data.responses.samples import TokenSample
from diffalign.data.token_budget import cut, padded_tokens, sequences
from diffalign.likelihoods.tokens import Tokens
from diffalign.models.vlm.model import VisionLanguageModel

WAYS = ("as they come", "by length", "packed to 2,048", "packed whole")
AT_ONCE = 4
"""Pairs of a forward pass as they come."""
COUNTED, PAIRS = 32, 32
"""Steps of which padding is counted, and pairs of each."""


def grid_of(family: str, shape: Shape, rng: np.random.Generator) -> tuple[int, int]:
    """Image tokens down and across of one image."""
    if family == "llava":
        return shape.grid
    least = min(8, shape.grid[0])
    rows, columns = rng.integers(least, max(shape.grid) + 1, size=2)
    return int(rows), int(columns)


def sample_of(
    family: str, shape: Shape, number: int, rng: np.random.Generator, median: int
) -> TokenSample:
    """One pair; the pixels of its image are zeros, since the tower is not what is measured."""
    rows, columns = grid_of(family, shape, rng)
    image = [START, *[IMAGE] * (rows * columns), END]
    prompt = [*image, *rng.integers(5, shape.words, rng.integers(30, 61)).tolist()]

    def response() -> EncodedResponse:
        length = int(np.clip(rng.lognormal(np.log(median), 0.6), min(8, median), 6 * median))
        ids = torch.tensor([*prompt, *rng.integers(5, shape.words, length).tolist()])
        further = {"mm_token_type_ids": (ids == IMAGE).long()} if family != "llava" else {}
        offsets = torch.zeros(length, 2, dtype=torch.int64)
        return EncodedResponse(input_ids=ids, start=len(prompt), offsets=offsets, further=further)

    if family == "llava":
        inputs = {"pixel_values": torch.zeros(1, 3, 14 * rows, 14 * columns)}
    else:
        inputs = {
            "pixel_values": torch.zeros(4 * rows * columns, 3 * 2 * 14 * 14),
            "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
        }
    return TokenSample(
        sample_id=str(number),
        visit=0,
        views=frozenset(VIEWS),
        responses={view: response() for view in VIEWS},
        image_inputs={None: inputs},
        image_count=1,
        weights={},
    )


def passes_of(lengths: list[list[int]], way: str) -> tuple[list[list[int]], int | None]:
    """Places of the samples of each forward pass, and up to where rows are packed."""
    in_order = [list(range(n, min(n + AT_ONCE, len(lengths)))) for n in range(0, len(lengths), 4)]
    if way == "as they come":
        return in_order, None
    largest = max(padded_tokens([lengths[n][0] for n in part]) for part in in_order)
    pack_to = {"by length": None, "packed to 2,048": 2048, "packed whole": largest}[way]
    return cut(lengths, tokens=largest, pack_to=pack_to), pack_to


def pairs_of_tokens(sample: TokenSample) -> float:
    """How many tokens of the row of a sample attend to how many, by the blocks that it is of."""
    first, second = (sample.responses[view] for view in VIEWS)
    together, further = len(first.input_ids), len(second.tokens)
    return together**2 / 2 + further * (second.start + further)


def products(
    shape: Shape, rows: list[int], pack_to: int | None, own: int, by_blocks: float
) -> dict[str, float]:
    """Of the published model's language model, of a forward pass, by how it attends.

    Args:
        shape: of the model.
        rows: their lengths.
        pack_to: see `sequences`.
        own: tokens of which logits are made.
        by_blocks: `pairs_of_tokens` of all rows.
    """
    width, key_value, inner, layers = shape.true_size
    weights = layers * (2 * width * width + width * key_value + 3 * width * inner)
    count = len(sequences(rows, pack_to))
    across = padded_tokens(rows, pack_to) // count
    rest = weights * count * across + shape.words * width * own
    seen = {"by_count": by_blocks, "under_a_mask": count * across**2}
    return {how: rest + 2 * layers * width * pairs for how, pairs in seen.items()}


def batches_of(samples: list[TokenSample], way: str) -> list[TokenBatch]:
    """The forward passes of a step."""
    parts, pack_to = passes_of([row_lengths(s, shared=True) for s in samples], way)
    stack = MicroBatches(
        pad_token_id=0,
        served=frozenset(VIEWS),
        tokens=None,
        rows=ModelRows(shared=True, pack_to=pack_to),
    )
    return [batch for part in parts for batch in stack([samples[n] for n in part])]


def step(model: VisionLanguageModel, batches: list[TokenBatch]) -> tuple[float, float]:
    """Mean loss of all pairs, and seconds."""
    likelihood, started, losses = Tokens(), now(), 0.0
    pairs = sum(map(len, batches))
    for batch in batches:
        prepared = likelihood.prepare(model, batch)
        with torch.no_grad(), model.reference():
            reference = likelihood.evaluate(model, prepared)
        policy = likelihood.evaluate(model, prepared)
        both = [torch.stack([of[view] for view in VIEWS]) for of in (policy, reference)]
        loss = dpo(*both) * len(batch) / pairs
        loss.backward()
        losses += loss.item()
    for _, parameter in model.trained_parameters():
        parameter.grad = None
    return losses, now() - started


def counted(family: str, shape: Shape, pairs: int, median: int) -> dict[str, dict[str, float]]:
    """Of every way over many steps: passes a step, share of padding, and products."""
    rng = np.random.default_rng(2)
    parts: dict[str, list[list[int]]] = {way: [] for way in WAYS}
    packs: dict[str, list[int | None]] = {way: [] for way in WAYS}
    made: dict[str, Counter[str]] = {way: Counter() for way in WAYS}
    for _ in range(COUNTED):
        some = [sample_of(family, shape, n, rng, median) for n in range(pairs)]
        lengths = [row_lengths(sample, shared=True) for sample in some]
        own = [sum(len(r.tokens) for r in sample.responses.values()) for sample in some]
        for way in WAYS:
            places, pack_to = passes_of(lengths, way)
            for part in places:
                rows = [lengths[n][0] for n in part]
                parts[way].append(rows)
                packs[way].append(pack_to)
                by_blocks = sum(pairs_of_tokens(some[n]) for n in part)
                made[way].update(
                    products(shape, rows, pack_to, sum(own[n] for n in part), by_blocks)
                )
    padded = {way: sum(map(padded_tokens, parts[way], packs[way])) for way in WAYS}
    whole = sum(sum(rows) for rows in parts["as they come"])
    return {
        way: {
            "passes": rounded(len(parts[way]) / COUNTED),
            "padding": round(1 - whole / padded[way], 3),
            **{how: rounded(made["as they come"][how] / made[way][how]) for how in made[way]},
        }
        for way in WAYS
    }


def timed(
    family: str, shape: Shape, *, width: int, pairs: int, rounds: int, median: int
) -> dict[str, str]:
    """How many times faster than as samples come each way is, with smallest and largest."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = wrapped(build(family, shape, width, device), "shared", device)
    rng = np.random.default_rng(1)
    samples = [sample_of(family, shape, number, rng, median) for number in range(pairs)]
    batches = {way: batches_of(samples, way) for way in WAYS}
    first = {way: step(model, some)[0] for way, some in batches.items()}
    if model.remarks() or max(first.values()) - min(first.values()) > 1e-5:
        raise SystemExit(f"{family}: the losses of the ways are {first}")
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            seconds[way].append(step(model, batches[way])[1])
    plain = seconds["as they come"]
    return {way: spread([p / s for p, s in zip(plain, seconds[way], strict=True)]) for way in WAYS}


def main(
    only: Annotated[list[str] | None, typer.Option(help="Families; all, if none is given.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of each; 0 for none.")] = 3,
    pairs: Annotated[int, typer.Option(help="Pairs in a step that is timed.")] = 8,
    tiny: Annotated[bool, typer.Option(help="One round of small models.")] = False,
) -> None:
    here = machine()
    cells: list[dict[str, Any]] = []
    for family in only or list(SHAPES):
        shape, width, median = replace(SHAPES[family], words=SHAPES["llava"].words), 256, 100
        if tiny:
            shape, width, median = replace(shape, words=200, grid=(4, 4)), 64, 6
            rounds, pairs = 1, 8
        found = counted(family, shape, PAIRS // 4 if tiny else PAIRS, median)
        times = dict.fromkeys(WAYS, "")
        if rounds:
            settings = {"width": width, "pairs": pairs, "rounds": rounds, "median": median}
            times = timed(family, shape, **settings)
        cells += [{"family": family, "way": w, **found[w], "ratio": times[w]} for w in WAYS]
    figures = "times faster | by count at 7B | under a mask"
    print(f"| family | a step is cut | passes | padding | {figures} |")
    print("|---|---|---|---|---|---|---|")
    for cell in cells:
        print(
            f"| {cell['family']} | {cell['way']} | {cell['passes']} | {cell['padding']:.1%} | "
            f"{cell['ratio']} | {cell['by_count']} | {cell['under_a_mask']} |"
        )
    print(f"\n{on_this_machine(here)}\n")
    print(json.dumps({"machine": here, "rounds": rounds, "pairs": pairs, "cells": cells}))


if __name__ == "__main__":
    typer.run(main)
