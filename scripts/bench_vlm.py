"""Image and prompt computed once for both responses of a pair, next to once for each, and to TRL.

    OMP_NUM_THREADS=1 python scripts/bench_vlm.py
    OMP_NUM_THREADS=1 python scripts/bench_vlm.py --only qwen2_5_vl --rounds 9
    OMP_NUM_THREADS=1 python scripts/bench_vlm.py --trl TRL_VENV/bin/python
    python scripts/bench_vlm.py --tiny                      # one round of small models

A step is reference, policy and backward pass of DPO with an adapter, on random weights and tokens;
`model.prefix` is shared in one and repeated in another, a third knows the reference's values in
advance, and with `--trl` a fourth is a `training_step` of TRL's DPOTrainer on the same tokens, in
the Python of a venv with trl and peft (scripts/trl_steps.py; TRL's compact path). All take turns in
one run, in reversed order every other round. The models have the image tokens, words and
architecture of LLaVA-1.5 and of Qwen2.5-VL (an image of 602112 pixels), and four layers of width
256. Seconds are of the CPU, on a GPU of the clock. A ratio, above 1 where the shared prefix is
faster, is the median of the rounds with the smallest and largest. MB are what a step takes on top
of what is there before it. By count is what sharing would be worth at 7B: products of a matrix with
tokens in the language model and its head, attention included. Exits if losses differ by more than
1e-5. Prints a Markdown table, then a line of JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

import torch
import typer
from bench_tokens import BETA, VIEWS, dpo
from measuring import machine, now, on_this_machine, rounded, spread
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from trl_steps import PeakMemory

from diffalign.data.batches import TokenBatch, TokenRows
from diffalign.likelihoods.tokens import PreparedTokens, Tokens
from diffalign.models import lora
from diffalign.models.lora import LoraSettings
from diffalign.models.reference import AdapterOff
from diffalign.models.vlm.block_attention import attend_by_blocks
from diffalign.models.vlm.families import LANGUAGE_LAYERS, find_modules
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.models.vlm.token_scores import TokenScorer

PREFIXES = ("shared", "repeated")
CACHED, TRL = "shared, reference known", "TRL"
RANK = 8
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
    attend_by_blocks(model)
    model.requires_grad_(False).to(device)
    scope = find_modules(model, where="benchmark").language_scope
    lora.attach(model, LoraSettings(rank=RANK), scope=scope)
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


class Step(NamedTuple):
    """A step, measured."""

    loss: float
    seconds: float
    bytes: int
    """At its worst, on top of what was there before."""
    tokens: int = 0
    """That went through the language model, padding left out."""


def step(model: VisionLanguageModel, batch: TokenBatch, known: Tensor | None = None) -> Step:
    """A step of ours.

    Args:
        model: of `wrapped`.
        batch: of `batch_of`.
        known: log-probabilities of the responses under the reference, [2, pairs].
    """
    likelihood = Tokens()
    with PeakMemory() as memory:
        started = now()
        prepared = likelihood.prepare(model, batch)
        reference = log_probs(model, prepared, reference=True) if known is None else known
        loss = dpo(log_probs(model, prepared, reference=False), reference)
        loss.backward()
        seconds = now() - started
    for _, parameter in model.trained_parameters():
        parameter.grad = None
    tokens = sum(int(rows.attention_mask.sum()) for rows in prepared.groups)
    return Step(loss.item(), seconds, memory.found, tokens)


def log_probs(model: VisionLanguageModel, prepared: PreparedTokens, *, reference: bool) -> Tensor:
    """Of both responses, [2, pairs]."""
    if reference:
        with torch.no_grad(), model.reference():
            found = Tokens().evaluate(model, prepared)
    else:
        found = Tokens().evaluate(model, prepared)
    return torch.stack([found[view] for view in VIEWS])


class Trl:
    """TRL in a process of its own, which takes a step whenever it is asked."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.versions = self._answer()

    def step(self) -> Step:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return Step(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print there as well
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit("TRL's process ended; what it said is above")


@contextmanager
def trl_of(python: Path, model: Any, batch: TokenBatch) -> Iterator[Trl]:
    """The same model, adapter and tokens in TRL."""
    modules = find_modules(model, where="benchmark")
    with tempfile.TemporaryDirectory(prefix="bench_vlm-") as name:
        folder = Path(name)
        adapter = {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
        save_file({n: p.contiguous() for n, p in adapter.items()}, folder / "adapter.safetensors")
        base = {
            n.replace(".base_layer", ""): v
            for n, v in model.state_dict().items()
            if ".lora_" not in n
        }
        type(model)(model.config).save_pretrained(folder / "model", state_dict=base)
        save_file(trl_inputs(batch), folder / "batch.safetensors")
        scope = rf".*{modules.language.rpartition('.')[2]}\..*\.({'|'.join(LANGUAGE_LAYERS)})"
        settings = {"rank": RANK, "alpha": RANK, "targets": scope, "beta": BETA, "compact": True}
        (folder / "settings.json").write_text(json.dumps(settings))
        command = [str(python), str(Path(__file__).with_name("trl_steps.py")), name]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            yield Trl(process)
            process.communicate()


def trl_inputs(batch: TokenBatch) -> dict[str, Tensor]:
    """What TRL's collator makes of the same pairs: chosen rows, then rejected ones."""
    both = [batch.responses[view] for view in VIEWS]
    width = max(rows.input_ids.shape[1] for rows in both)

    def stacked(tensors: list[Tensor]) -> Tensor:
        return torch.cat([pad(some, (0, width - some.shape[1])) for some in tensors])

    images = {key: torch.cat([value] * 2) for key, value in batch.image_inputs[None].items()}
    return {
        "input_ids": stacked([rows.input_ids for rows in both]),
        "attention_mask": stacked([rows.attention_mask for rows in both]),
        "completion_mask": stacked([rows.response_mask.long() for rows in both]),
        **{key: stacked([rows.further[key] for rows in both]) for key in both[0].further},
        **images,
    }


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
    family: str,
    shape: Shape,
    *,
    width: int,
    pairs: int,
    rounds: int,
    lengths: tuple[int, int],
    trl: Path | None,
) -> dict[str, Any]:
    """Figures of one family."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build(family, shape, width, device)
    batch = batch_of(family, shape, pairs, lengths)
    models = {prefix: wrapped(network, prefix, device) for prefix in PREFIXES}
    step(models["shared"], batch)  # compares both layouts
    prepared = Tokens().prepare(models["shared"], batch)
    known = log_probs(models["shared"], prepared, reference=True)
    ways: dict[str, Callable[[], Step]] = {
        **{prefix: partial(step, model, batch) for prefix, model in models.items()},
        CACHED: partial(step, models["shared"], batch, known),
    }
    with ExitStack() as stack:
        versions = {}
        if trl is not None:
            peer = stack.enter_context(trl_of(trl, network, batch))
            ways[TRL], versions = peer.step, peer.versions
        first = {way: take() for way, take in ways.items()}
        losses = {way: one.loss for way, one in first.items()}
        apart = max(losses.values()) - min(losses.values())
        if models["shared"].remarks() or not apart <= 1e-5:
            raise SystemExit(f"{family}: the losses differ: {losses}")
        taken: dict[str, list[Step]] = {way: [] for way in ways}
        for number in range(rounds):
            for way in list(ways)[:: 1 if number % 2 == 0 else -1]:
                taken[way].append(ways[way]())
    seconds = {way: [one.seconds for one in steps] for way, steps in taken.items()}
    bytes_of = {way: statistics.median(one.bytes for one in steps) for way, steps in taken.items()}

    def times(slow: str, fast: str) -> str:
        return spread([s / f for s, f in zip(seconds[slow], seconds[fast], strict=True)])

    return {
        "family": family,
        "words": shape.words,
        "tokens": {prefix: first[prefix].tokens // pairs for prefix in PREFIXES},
        "pairs_per_second": {w: rounded(pairs / statistics.median(s)) for w, s in seconds.items()},
        "megabytes": {way: round(most / 2**20) for way, most in bytes_of.items()},
        "times": {
            "repeated by shared": times("repeated", "shared"),
            "by_count": rounded(by_count(shape, lengths)),
            **({"TRL by shared": times(TRL, "shared")} if trl else {}),
            **({f"TRL by {CACHED}": times(TRL, CACHED)} if trl else {}),
        },
        "versions_of_trl": versions,
        "losses_apart": apart,
        "loss": losses["shared"],
    }


def main(
    only: Annotated[list[str] | None, typer.Option(help="Families; all, if none is given.")] = None,
    rounds: Annotated[int, typer.Option(help="Steps of each.")] = 5,
    pairs: Annotated[int, typer.Option(help="Pairs in a step.")] = 2,
    trl: Annotated[Path | None, typer.Option(help="A Python that has trl and peft.")] = None,
    tiny: Annotated[bool, typer.Option(help="One round of small models.")] = False,
) -> None:
    here, cells = machine(), []
    for family in only or list(SHAPES):
        shape, width, lengths = SHAPES[family], 256, RESPONSES
        if tiny:
            small = Shape(words=200, grid=(4, 4), true_size=shape.true_size)
            shape, width, lengths, rounds, pairs = small, 64, (6, 3), 1, 1
        found = measure(
            family, shape, width=width, pairs=pairs, rounds=rounds, lengths=lengths, trl=trl
        )
        cells.append(found)
    for cell in cells:
        tokens = " and ".join(f"{cell['tokens'][prefix]:,} ({prefix})" for prefix in PREFIXES)
        print(f"{cell['family']}, {cell['words']:,} words, tokens a pair: {tokens}\n")
        print("| step | pairs/s | MB |\n|---|---|---|")
        for way, rate in cell["pairs_per_second"].items():
            print(f"| {way} | {rate} | {cell['megabytes'][way]:,} |")
        said = ", ".join(f"{what} {value}" for what, value in cell["times"].items())
        print(f"\nTimes: {said}. Losses differ by {cell['losses_apart']:.1e}.\n")
    print(f"{on_this_machine(here)}\n")
    print(json.dumps({"machine": here, "rounds": rounds, "pairs": pairs, "cells": cells}))


if __name__ == "__main__":
    typer.run(main)
