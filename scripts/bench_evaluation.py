"""Questions about images, asked by `diffalign evaluate` and by a plain loop over `generate`.

    OMP_NUM_THREADS=1 python scripts/bench_evaluation.py
    OMP_NUM_THREADS=1 python scripts/bench_evaluation.py --only playground --batch-size 32
    OMP_NUM_THREADS=1 python scripts/bench_evaluation.py --tiny      # a few questions, small models

Three ways: `shared` is what `evaluate` does, which looks at an image once for all that is asked
about it; `repeated` is the same with model.prefix=repeated, batches in which every question has its
own image; `plain` is transformers' `generate`, one question after the other. `playground` asks the
playground's LLaVA POPE's questions about held-out scenes, of all three splits. `llava-576` is a
model of random weights with LLaVA-1.5's 576 image tokens and vocabulary, and four layers of width
256; six questions an image. Weights are loaded before; images are read, and responses written,
within the time. Images are dealt out to rounds; the ways take turns in each, in reversed order
every other time. Seconds are of the CPU, on a GPU of the clock. The ratio, above 1 where sharing is
faster, is the median of the rounds with the smallest and largest. Exits if a response differs from
the plain loop's. Prints a Markdown table, then a line of JSON.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measuring import machine, now, on_this_machine, rounded, spread
from peer_models import LLAVA
from PIL import Image

from diffalign.blocks import Block, share
from diffalign.console import silence_libraries
from diffalign.generation.responses import Asked, Asking, ImageQuestion, ResponsesPlan
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.processor import question_prompt
from diffalign.playground.multi_object_scenes import kinds_in
from diffalign.playground.questions import SPLITS, absent_kinds, existence_question
from diffalign.playground.response_quality import held_out_multi_object_scenes
from diffalign.playground.scenes import render

WAYS = ("shared", "repeated", "plain")
NEW_TOKENS = 8
THINGS = ("person", "dog", "dining table", "car", "cup", "traffic light")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and what it is asked."""

    name: str
    model: Path
    questions: Sequence[ImageQuestion]


def playground(folder: Path, count: int) -> Case:
    """So many of POPE's questions about held-out scenes."""
    questions: list[ImageQuestion] = []
    for number, scene in enumerate(held_out_multi_object_scenes(count)):
        path = folder / f"{number:06}.png"
        render(scene).save(path)
        asked = [*kinds_in(scene)]
        for split in SPLITS:
            asked += absent_kinds(scene, split, seed=number)
        for kind in dict.fromkeys(asked):
            name = f"{number}/{kind}"
            text = existence_question(kind)
            questions.append(ImageQuestion(question_id=name, image=path, text=text))
        if len(questions) >= count:
            break
    return Case(name="playground", model=LLAVA, questions=questions[:count])


def llava_576(folder: Path, count: int, *, side: int = 24, width: int = 256) -> Case:
    """A random model with LLaVA-1.5's image tokens, and six questions an image.

    Args:
        folder: created.
        count: of questions.
        side: image tokens down and across.
        width: of the language model.
    """
    from transformers import (
        AutoProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    processor = AutoProcessor.from_pretrained(LLAVA)
    tokenizer, pixels = processor.tokenizer, 14 * side
    processor.patch_size = 14
    processor.image_processor.size = {"shortest_edge": pixels}
    processor.image_processor.crop_size = {"height": pixels, "width": pixels}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=pixels,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=32_064,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=LlavaConfig.from_pretrained(LLAVA).image_token_index,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    random, questions = np.random.default_rng(0), []
    for number in range(-(-count // len(THINGS))):
        path = folder / f"{number:06}.jpg"
        levels = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(levels).resize((640, 480), Image.Resampling.BICUBIC).save(path)
        for thing in THINGS:
            name, text = f"{number}/{thing}", f"Is there a {thing} in the image?"
            questions.append(ImageQuestion(question_id=name, image=path, text=text))
    return Case(name="llava-576", model=folder / "model", questions=questions[:count])


Ask = Callable[[Sequence[Block]], dict[str, str]]


def ours(case: Case, prefix: Any, batch_size: int, folder: Path) -> tuple[ResponsesPlan, Ask]:
    """The command's own plan of work, done in this process with the model loaded once."""
    asking = Asking(
        images=folder,
        saves=folder / f"{prefix}.jsonl",
        max_new_tokens=NEW_TOKENS,
        batch_size=batch_size,
    )
    model = VLM(path=str(case.model), prefix=prefix)
    plan = ResponsesPlan(Asked(model=model, questions=case.questions, asking=asking))
    do = plan.open(None, plan.blocks)

    def ask(blocks: Sequence[Block]) -> dict[str, str]:
        said: dict[str, str] = {}
        for block in blocks:
            made = do(block)
            plan.write(block, made)
            said |= {row.values["question_id"]: row.values["answer"] for row in made}
        return said

    return plan, ask


def plain(case: Case) -> Ask:
    """One question after the other, as a loop over transformers asks them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    processor = AutoProcessor.from_pretrained(case.model)
    model: Any = AutoModelForImageTextToText.from_pretrained(case.model, dtype=dtype)
    model.to(device).eval()
    banned = [model.config.image_token_id]

    def ask(blocks: Sequence[Block]) -> dict[str, str]:
        said = {}
        for question in [question for block in blocks for question in block.work]:
            image = Image.open(question.image).convert("RGB")
            prompt = question_prompt(processor, question.text)
            inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(device)
            with torch.no_grad():
                written = model.generate(
                    **inputs,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    suppress_tokens=banned,
                )
            new = written[0, inputs["input_ids"].shape[1] :]
            text = processor.tokenizer.decode(new, skip_special_tokens=True)
            said[question.question_id] = text.strip()
        return said

    return ask


def measure(case: Case, rounds: int, batch_size: int, folder: Path) -> dict[str, Any]:
    """Figures of one model."""
    plan, shared = ours(case, "auto", batch_size, folder)
    _, repeated = ours(case, "repeated", batch_size, folder)
    ways: dict[str, Ask] = {"shared": shared, "repeated": repeated, "plain": plain(case)}
    parts = [share(plan.blocks, number=number, of=rounds) for number in range(rounds)]
    for ask in ways.values():  # warm-up, and the check of the first responses
        ask(parts[0][:2])
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    same = dict.fromkeys(WAYS, 0)
    for number, part in enumerate(filter(None, parts)):
        said: dict[str, dict[str, str]] = {}
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            started = now()
            said[way] = ways[way](part)
            seconds[way].append(now() - started)
        for way in WAYS:
            same[way] += sum(said[way][name] == text for name, text in said["plain"].items())
    count = len(case.questions)
    if same["shared"] != count:
        raise SystemExit(f"{case.name}: {count - same['shared']} of {count} responses differ")
    return {
        "case": case.name,
        "questions": count,
        "images": len({question.image for question in case.questions}),
        "same": same,
        "per_second": {way: rounded(count / sum(of_way)) for way, of_way in seconds.items()},
        "ratio": {
            way: spread([r / s for s, r in zip(seconds["shared"], seconds[way], strict=True)])
            for way in WAYS[1:]
        },
        "median_seconds": {way: statistics.median(seconds[way]) for way in WAYS},
    }


def main(
    only: Annotated[
        str | None, typer.Option(help="playground or llava-576; both if left out")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Of each way, in turn.", min=1)] = 6,
    batch_size: Annotated[int, typer.Option(help="asking.batch_size")] = 16,
    questions: Annotated[int, typer.Option(help="To the playground's model.")] = 3000,
    tiny: Annotated[bool, typer.Option(help="A few questions, one round.")] = False,
) -> None:
    """Print the table and the JSON."""
    if only not in (None, "playground", "llava-576"):
        raise SystemExit(f"--only {only}: there is playground and llava-576")
    silence_libraries()
    here, cells = machine(), []
    with tempfile.TemporaryDirectory(prefix="bench_evaluation-") as scratch:
        for name in ("playground", "llava-576"):
            if only not in (None, name):
                continue
            folder = Path(scratch) / name
            folder.mkdir()
            if tiny:
                rounds, questions = 1, 12
            if name == "playground":
                case = playground(folder, questions)
            else:
                sizes = {"side": 4, "width": 64} if tiny else {}
                case = llava_576(folder, 12 if tiny else 24 * rounds, **sizes)
            cells.append(measure(case, rounds, batch_size, folder))
    columns = ["model", "images", "questions", "same responses", f"questions/s, {' / '.join(WAYS)}"]
    columns += ["times repeated", "times plain"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for cell in cells:
        rates = " / ".join(f"{cell['per_second'][way]}" for way in WAYS)
        print(
            f"| {cell['case']} | {cell['images']} | {cell['questions']:,} | "
            f"{cell['same']['shared']:,} of {cell['questions']:,} | {rates} | "
            f"{cell['ratio']['repeated']} | {cell['ratio']['plain']} |"
        )
    print(f"\n{on_this_machine(here)}\n")
    print(json.dumps({"machine": here, "batch_size": batch_size, "cells": cells}))


if __name__ == "__main__":
    typer.run(main)
