"""Host memory of a model that is loaded into its shards, and of one that every process holds.

    python scripts/bench_sharding.py              # two sizes of SDXL and of LLaVA, 2 processes
    python scripts/bench_sharding.py --true-size  # SDXL as it is: 7 GB of disk, 16 of memory
    python scripts/bench_sharding.py --tiny       # every width cut down

Makes models with random weights, and loads each with a frozen copy, as full fine-tuning does, in as
many processes as `--processes` says, on the CPU in bf16. A process's share is its part of the
policy in float32 and of the copy as that is kept; one block is the largest that is put together at
once, in float32. Peaks are those of the kernel (of Linux alone) above the process's start, files
that are mapped included. Prints a Markdown table for docs/performance.md, and JSON with `--json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from drill_sdxl import CONFIG, GIB, forget_peak, make_model, make_pairs, memory

RESPONSES = Path(__file__).parents[1] / "configs/dpo/llava15_7b.yaml"
SDXL_WIDTHS = {"SDXL, 1/4": (160, 320, 640), "SDXL, 1/2": (224, 448, 896)}
LLAVA_LAYERS = {"LLaVA, 6 layers": 6, "LLaVA, 12 layers": 12}


def main(
    folder: Path | None, *, processes: int, tiny: bool, true_size: bool, as_json: bool
) -> None:
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="bench_sharding-", dir=folder) as scratch:
        place = Path(scratch)
        make_pairs(place / "pairs")
        for title, settings in _models(place, tiny=tiny, true_size=true_size):
            kinds = ("fsdp2",) if true_size or tiny else ("fsdp2", "none")
            for sharding in kinds:
                found = load_in_processes(
                    place, [*settings, f"training.sharding={sharding}"], processes
                )
                rows.append({"model": title, "sharding": sharding, "processes": processes, **found})
    if as_json:
        print(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
        return
    print(
        "| model | sharding | processes | share, GiB | one block | peak of a process | "
        "peak over share and block | all processes |\n|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['model']} | {row['sharding']} | {row['processes']} | {row['share'] / GIB:.2f} "
            f"| {row['block'] / GIB:.2f} | {row['peak'] / GIB:.2f} "
            f"| {row['peak'] / (row['share'] + row['block']):.2f} | {row['all'] / GIB:.2f} |"
        )


def _models(place: Path, *, tiny: bool, true_size: bool) -> Any:
    """Title and settings of each model, made when it is asked for."""
    images = [f"data.path={place / 'pairs'}", "data.resolution=256", "data.workers=0"]
    images += ["model.revision=null", "model.vae=null", "model.encoders=cached", "model.lora=null"]
    widths = {"SDXL": None} if true_size or tiny else SDXL_WIDTHS
    for number, (title, width) in enumerate(widths.items()):
        path = place / f"sdxl-{number}"
        make_model(path, tiny=tiny, widths=width)
        yield title, [str(CONFIG), f"model.path={path}", f"encodings_cache={place}", *images]
    if true_size:
        return
    for title, layers in LLAVA_LAYERS.items() if not tiny else {"LLaVA, 2 layers": 2}.items():
        path = place / f"llava-{layers}"
        make_llava(path, layers=layers, tiny=tiny)
        yield (
            title,
            [str(RESPONSES), f"model.path={path}", "model.lora=null", "model.revision=null"],
        )


def make_llava(folder: Path, *, layers: int, tiny: bool) -> None:
    """Write a LLaVA folder in bf16 with random weights, and no processor: nothing is read by it."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    width = 32 if tiny else 2048
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=2 if tiny else 16,
        vocab_size=512 if tiny else 32000,
    )
    vision = CLIPVisionConfig(
        hidden_size=32 if tiny else 256,
        intermediate_size=64 if tiny else 512,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)


def load_in_processes(place: Path, settings: list[str], processes: int) -> dict[str, int]:
    """What the processes took at most, and what they have to take."""
    ranks = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [sys.executable, *ranks, __file__, "--rank-of", str(place / "found"), *settings]
    where = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=where)
    if done.returncode:
        sys.exit(f"loading failed\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    found = [json.loads((place / f"found-{rank}.json").read_text()) for rank in range(processes)]
    most: dict[str, int] = {key: max(each[key] for each in found) for key in found[0]}
    return {**most, "all": sum(each["peak"] for each in found)}


def load(settings: list[str], result: Path) -> None:
    """Load one model on this rank, and write what it took."""
    from diffalign import config, world
    from diffalign.models.sharding import is_sharded
    from diffalign.models.vlm.config import VLM
    from diffalign.training import build
    from diffalign.training.config import RunConfig
    from diffalign.training.sharding import sharder_of

    file, *overrides = settings
    run = config.load(RunConfig, Path(file), [f"output={result.parent}", *overrides])
    accelerator = build.build_accelerator(run)
    VLM.processor = lambda self: None  # type: ignore[assignment,method-assign,return-value]
    sharder = sharder_of(run, accelerator)
    world.wait()
    start = memory("VmRSS")
    forget_peak()
    model = run.model.load(
        device=accelerator.device,
        compute_dtype=torch.bfloat16,
        reference="frozen_copy",
        **({} if sharder is None else {"sharder": sharder}),
    )
    peak = memory("VmHWM") - start
    network, copy = model.network, model._reference.network  # type: ignore[attr-defined]
    share = sum(
        (p.to_local() if is_sharded(p) else p).nbytes
        for whole in (network, copy)
        for p in whole.parameters()
    )
    found = {"share": share, "block": largest_block(network), "peak": peak}
    result.with_name(f"{result.name}-{world.rank()}.json").write_text(json.dumps(found))
    world.wait()
    build.end(accelerator)


def largest_block(network: torch.nn.Module) -> int:
    """Bytes in float32 of the most that is put together at once, blocks within it left out."""
    names = {name.removeprefix("FSDP") for name in network._no_split_modules}  # type: ignore[union-attr]
    blocks = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in network.named_modules()
        if type(module).__name__.removeprefix("FSDP") in names
    }
    inside = {
        name: sum(size for other, size in blocks.items() if other.startswith(f"{name}."))
        for name in blocks
    }
    return max(4 * (size - inside[name]) for name, size in blocks.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="every width cut down")
    parser.add_argument("--true-size", action="store_true", help="SDXL as it is, sharded alone")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_of is None:
        main(
            given.folder,
            processes=given.processes,
            tiny=given.tiny,
            true_size=given.true_size,
            as_json=given.json,
        )
    else:
        load(given.settings, given.rank_of)
