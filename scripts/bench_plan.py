"""The memory that `diffalign plan` says a run takes, next to the peak that the run then has.

    OMP_NUM_THREADS=1 python scripts/bench_plan.py [--config CONFIG.yaml] [key.path=value ...]
    OMP_NUM_THREADS=1 python scripts/bench_plan.py --only cached --allocator-as-it-is ...
    OMP_NUM_THREADS=1 python scripts/bench_plan.py --responses [--rows 768] [--pairs 16]

Plans and trains a few steps in ways that differ in what they hold, each in processes of its own, on
the device that is here, and prints a Markdown table for docs/performance.md; with --responses small
vision-language models of random weights with the true numbers of words, on rows as long as is
planned for. Fails where plan and
peak are more than 15 % apart. The peak of a CPU is that of the whole process, interpreter and
libraries included, as the kernel has it; that of a GPU is that of its tensors. On Linux glibc is
told to give freed pages back (MALLOC_MMAP_THRESHOLD_), of which it keeps some otherwise: see it
with --allocator-as-it-is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from peer_models import write

CONFIG = Path(__file__).resolve().parents[1] / "configs/playground/diffusion_dpo.yaml"
RESPONSES = CONFIG.with_name("responses") / "dpo.yaml"
LORA = "model.lora={rank: 16}"
CACHED = ("model.encoders=cached", "reference=cached")
WAYS: dict[str, tuple[str, ...]] = {
    "full": ("model.lora=null",),
    "LoRA": (LORA,),
    "cached": (LORA, *CACHED),
    "checkpointed": ("model.lora=null", "model.gradient_checkpointing=true"),
    "quantised": (LORA, "model.quantization=8bit"),
}
WAYS_OF_RESPONSES: dict[str, tuple[str, ...]] = {
    "LLaVA, LoRA": (LORA,),
    "LLaVA, full, checkpointed": ("model.lora=null", "model.gradient_checkpointing=true"),
    "Qwen2.5-VL, LoRA, repeated rows": (LORA, "model.prefix=repeated"),
    "Qwen2.5-VL, full, bf16": ("model.lora=null", "training.precision=bf16"),
}
SMALL_RESPONSES = (
    *("responses.workers=0", "model.positions_at_once=64"),
    *("training.optimizer_steps=3", "optimizer.warmup_steps=0"),
)
SMALL = (
    *("data.resolution=256", "data.limit=64", "data.workers=0", "data.visits=2"),
    *("data.reuse_visits=true", "training.optimizer_steps=3", "optimizer.warmup_steps=0"),
)
APART = 0.15


def diffalign(*words: str, changes: Mapping[str, str]) -> str:
    """What a command prints, with changes to its environment."""
    command = [sys.executable, "-m", "diffalign", *words]
    env = {**os.environ, **changes}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def write_pairs(folder: Path, model: Path, *, rows: int, pairs: int) -> Path:
    """Write pairs about one image each, whose conversations have nearly so many tokens."""
    from PIL import Image
    from transformers import AutoProcessor

    folder.mkdir()
    processor = AutoProcessor.from_pretrained(model)
    image = Image.new("RGB", (448, 448), "red")
    image.save(folder / "image.png")
    question = "what is in the image ? " * 8

    def tokens(response: str) -> int:
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": response}]},
        ]
        text = processor.apply_chat_template(turns, tokenize=False)
        return int(processor(text=[text], images=[image])["input_ids"][0].__len__())

    def written(word: str) -> str:
        each = (tokens(word * 200) - tokens(word * 100)) / 100
        return word * int((rows - 4 - tokens(word)) / each)

    row = {"images": ["image.png"], "prompt": question}
    row |= {side: written(word) for side, word in (("chosen", "red "), ("rejected", "blue "))}
    (folder / "pairs.jsonl").write_text(f"{json.dumps(row)}\n" * pairs)
    return folder / "pairs.jsonl"


def compare(config: Path, settings: list[str], changes: Mapping[str, str]) -> tuple[float, float]:
    """GiB planned, and at the peak of the run."""
    words = (str(config), *settings)
    planned = json.loads(diffalign("plan", *words, "--json", changes=changes).splitlines()[-1])
    if set(CACHED) & set(settings):
        diffalign("precompute", *words, changes=changes)
    said = re.search(r"Peak memory: ([\d.]+) GiB", diffalign("train", *words, changes=changes))
    assert said is not None, "a run says what it took"
    part = "tensors_bytes" if torch.cuda.is_available() else "total_bytes"
    return planned[part] / 2**30, float(said[1])


def main(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key.path=value")] = None,
    config: Path = CONFIG,
    only: Annotated[list[str] | None, typer.Option(help=", ".join(WAYS))] = None,
    allocator_as_it_is: bool = False,
    responses: bool = False,
    rows: Annotated[int, typer.Option(help="Tokens of a conversation with a response.")] = 768,
    pairs: Annotated[int, typer.Option(help="Of a micro-batch of responses.")] = 16,
) -> None:
    """Print the table."""
    ways = WAYS_OF_RESPONSES if responses else WAYS
    changes = {} if allocator_as_it_is else {"MALLOC_MMAP_THRESHOLD_": "65536"}
    print("| run | planned, GiB | peak, GiB | peak / planned |\n|---|---|---|---|")
    apart = []
    for name in only or ways:
        if name == "quantised" and importlib.util.find_spec("bitsandbytes") is None:
            print("| quantised | bitsandbytes is not installed | | |")
            continue
        with TemporaryDirectory() as folder:
            settings = [*SMALL, *WAYS[name]] if not responses else [*ways[name]]
            if responses:
                kind = name.partition(",")[0].partition("2")[0].lower()
                model = write(kind, Path(folder) / "model", true_size=False)
                data = write_pairs(Path(folder) / "data", model, rows=rows, pairs=2 * pairs)
                settings += [*SMALL_RESPONSES, f"model.path={model}", f"responses.path={data}"]
                settings += [f"responses.max_length={rows}", f"training.samples_per_device={pairs}"]
            settings += [f"output={folder}/run", *(overrides or ())]
            used = RESPONSES if responses and config == CONFIG else config
            planned, peak = compare(used, settings, changes)
        print(f"| {name} | {planned:.2f} | {peak:.2f} | {peak / planned:.2f} |", flush=True)
        if abs(peak / planned - 1) > APART:
            apart.append(name)
    if apart:
        sys.exit(f"more than {APART:.0%} apart: {', '.join(apart)}")


if __name__ == "__main__":
    typer.run(main)
