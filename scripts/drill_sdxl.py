"""SDXL at its true size, with random weights: whether the 24 GB config trains, and in what memory.

    python scripts/drill_sdxl.py                        # needs 7 GB of disk and 12 GB of memory
    python scripts/drill_sdxl.py --folder /big --full   # also loads a policy with a frozen copy
    python scripts/drill_sdxl.py --processes 2          # two processes train together
    python scripts/drill_sdxl.py --tiny                 # the same with every width cut down

Makes a folder of the true architecture in fp16 and a few pairs of noise, encodes them in advance,
runs two steps of `configs/diffusion_dpo/sdxl_lora_24gb.yaml` at 256 pixels on the CPU in bf16 with
`model.encoders: cached` and `reference: cached`, generates an image with the exported LoRA, and
deletes all of it, also after an error. What departs from the config: the model's own autoencoder in
bf16, and one pair a step; and on CPUs without AVX-512, which take minutes for a convolution in
bf16, convolutions compute in float32 and round their result, for which a layer's weights are in
float32 for a while. Each stage is a process of its own; its memory is what it holds above its
start, and its peaks are those of the kernel (of Linux alone). Planned is what `diffalign plan`
counts for tensors on a CPU.
Prints Markdown tables for docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

CONFIG = Path(__file__).parents[1] / "configs/diffusion_dpo/sdxl_lora_24gb.yaml"
GIB = 2**30
SHARD = 2**30
"""Bytes of a file of weights."""

UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
ENCODERS: tuple[dict[str, Any], ...] = (
    {
        **{"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768},
        **{"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"},
    },
    {
        **{"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280},
        **{"num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu"},
    },
)
TINY_UNET = {
    **{"block_out_channels": (32, 32, 64), "attention_head_dim": (2, 2, 4), "sample_size": 32},
    **{"transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": 48},
    **{"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80},
}
TINY_VAE = {"block_out_channels": (32, 32, 32, 32), "sample_size": 256}
TINY_ENCODERS = tuple(
    {
        **{"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width},
        **{"num_hidden_layers": 2, "num_attention_heads": 2},
    }
    for width in (16, 32)
)
PAIRS = 4


def main(folder: Path | None, *, tiny: bool, full: bool, processes: int) -> None:
    started = time.perf_counter()
    with TemporaryDirectory(prefix="drill_sdxl-", dir=folder) as scratch:
        place = Path(scratch)
        make_model(place / "model", tiny=tiny)
        make_pairs(place / "pairs")
        size = sum(file.stat().st_size for file in (place / "model").rglob("*") if file.is_file())
        print(f"Model of {size / GIB:.2f} GiB made in {time.perf_counter() - started:.0f} s\n")
        settings = [
            *(f"model.path={place / 'model'}", "model.revision=null", f"output={place / 'run'}"),
            f"encodings_cache={place / 'encodings'}",
            *(f"reference_cache={place / 'reference'}", "data.visits=1"),
            *("model.vae=null", "model.vae_dtype=bf16", f"data.path={place / 'pairs'}"),
            *("data.resolution=256", "data.workers=0"),
            *("training.optimizer_steps=2", "training.accumulation=1", "optimizer.warmup_steps=0"),
        ]
        loads = {"LoRA over a base in bf16": []}
        if full:
            loads["all weights, and a frozen copy in bf16"] = ["model.lora=null"]
        print("| loading alone | stays, GiB | peak, GiB | ratio | seconds |\n|---|---|---|---|---|")
        for title, more in loads.items():
            found = in_new_process(place, "load", [*settings, *more])["load"]
            ratio = found["peak"] / found["stays"]
            row = [f"{found[key] / GIB:.2f}" for key in ("stays", "peak")]
            print(f"| {title} | {' | '.join(row)} | {ratio:.2f} | {found['seconds']:.0f} |")
        encoded = in_new_process(place, "precompute", settings)["precompute"]
        known = ["model.encoders=cached", "reference=cached"]
        trained = in_new_process(place, "train", [*settings, *known], processes=processes)
        planned = in_new_process(place, "plan", [*settings, *known])["plan"]
        print("\n| part of a step | planned, GiB | in the run, GiB |\n|---|---|---|")
        for part, size in planned["parts"].items():
            there = trained["parts"].get(part)
            print(
                f"| {part} | {size / GIB:.2f} | {'' if there is None else f'{there / GIB:.2f}'} |"
            )
        peak, weights = trained["steps"]["peak"], trained["parts"]
        planned_weights = sum(planned["parts"].get(part, 0) for part in weights)
        cells = (planned["peak"] - planned_weights, peak - sum(weights.values()))
        print(f"| all but weights | {cells[0] / GIB:.2f} | {cells[1] / GIB:.2f} |")
        print(f"| peak of the steps | {planned['peak'] / GIB:.2f} | {peak / GIB:.2f} |")
        print(f"\nThe run's peak is {peak / planned['peak']:.2f} times what was planned.\n")
        print("| stage | peak, GiB |\n|---|---|")
        print(f"| `precompute` | {encoded['peak'] / GIB:.2f} |")
        for phase in ("load", "export"):
            print(f"| {phase} | {trained[phase]['peak'] / GIB:.2f} |")
        if processes > 1:
            whole = sum(rank["load"]["in all"] for rank in trained["ranks"])
            print(f"| load, {processes} processes, interpreters included | {whole / GIB:.2f} |")
        back = in_new_process(place, "back", [str(place)])["back"]
        print(f"| an image with the LoRA | {back['peak'] / GIB:.2f} |")
    print(f"\nThe exported LoRA loads back. {time.perf_counter() - started:.0f} s in all")


def in_new_process(
    place: Path, stage: str, arguments: list[str], *, processes: int = 1
) -> dict[str, Any]:
    """What a stage measures on the main process, and on all as `ranks`; its own output is shown if
    it fails."""
    result = place / stage
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    launch = [sys.executable, *(start if processes > 1 else [])]
    command = [*launch, __file__, "--stage", stage, "--result", str(result), *arguments]
    on_the_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=on_the_cpu)
    if done.returncode:
        said = f"\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        if done.returncode == -signal.SIGKILL:
            said = ": it was killed, most likely for want of memory" + said
        sys.exit(f"stage {stage} failed{said}")
    files = [result.with_name(f"{stage}-{rank}.json") for rank in range(processes)]
    ranks: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]
    return {**ranks[0], "ranks": ranks}


def measure(stage: str, arguments: list[str], result: Path) -> None:
    """Run one stage in this process, and write what it took."""
    from diffalign import config
    from diffalign.jobs import precompute, train
    from diffalign.models.diffusion.model import DiffusionModel
    from diffalign.models.diffusion.sdxl import SDXL
    from diffalign.training.config import RunConfig
    from diffalign.training.step_memory import step_memory

    found: dict[str, Any] = {}
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        torch.nn.Conv2d._conv_forward = _convolve  # type: ignore[method-assign]
    start = memory("VmRSS")

    def measured(phase: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        forget_peak()
        began = time.perf_counter()
        value = call(*args, **options)
        found[phase] = {
            "in all": memory("VmHWM"),
            "peak": memory("VmHWM") - start,
            "stays": memory("VmRSS") - start,
            "seconds": time.perf_counter() - began,
        }
        return value

    if stage == "load":
        run = config.load(RunConfig, CONFIG, arguments)
        adapter = run.model.trains_adapter
        model = measured(
            "load",
            run.model.load,
            device=torch.device("cpu"),
            compute_dtype=torch.bfloat16,
            reference="adapter_off" if adapter else "frozen_copy",
        )
        del model
    elif stage == "precompute":
        measured("precompute", precompute.run, config.load(RunConfig, CONFIG, arguments))
    elif stage == "plan":
        planned = step_memory(config.load(RunConfig, CONFIG, arguments), device="cpu")
        found["plan"] = {"peak": planned.peak, "parts": dict(planned.parts)}
    elif stage == "train":
        load, export = SDXL.load, DiffusionModel.export

        def loading(self: SDXL, **options: Any) -> DiffusionModel:
            model: DiffusionModel = measured("load", load, self, **options)
            found["parts"] = _parts(model)
            forget_peak()
            return model

        def exporting(self: DiffusionModel, *args: Any) -> None:
            found["steps"] = {"peak": memory("VmHWM") - start}
            measured("export", export, self, *args)

        SDXL.load, DiffusionModel.export = loading, exporting  # type: ignore[method-assign]
        train.run(config.load(RunConfig, CONFIG, arguments))
    else:
        measured("back", _generate, Path(arguments[0]))
    rank = os.environ.get("RANK", "0")
    result.with_name(f"{result.name}-{rank}.json").write_text(json.dumps(found))


def _convolve(
    layer: torch.nn.Conv2d, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """What a layer computes, in float32, and rounded as it would be."""
    reduced = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if reduced else given.dtype
    with torch.autocast("cpu", enabled=False):
        result = torch.nn.functional.conv2d(
            given.to(dtype).float(),
            weight.to(dtype).float(),
            None if bias is None else bias.to(dtype).float(),
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )
    return result.to(dtype)


def _parts(model: Any) -> dict[str, int]:
    """Bytes of what a loaded model holds."""
    policy = list(model.network.parameters())
    return {
        "base weights": _bytes(p for p in policy if not p.requires_grad),
        "trained weights": _bytes(p for p in policy if p.requires_grad),
    }


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _generate(place: Path) -> None:
    """One image with the exported LoRA, by the command's own road."""
    from safetensors.torch import load_file

    from diffalign import config
    from diffalign.jobs import generate

    tensors = load_file(next((place / "run/final").glob("pytorch_lora_weights.safetensors")))
    seconds = [value for name, value in tensors.items() if ".lora_B." in name]
    if not seconds or not all(value.isfinite().all() for value in tensors.values()):
        sys.exit("the exported LoRA holds numbers that are not finite")
    if not any(value.any() for value in seconds):
        sys.exit("the exported LoRA changes nothing: its second factors are zero")
    settings = [
        *(f"models.aligned={place / 'run'}", "prompts.texts=[a red fox]", "device=cpu"),
        *("sampler.steps=1", "sampler.guidance=1", "sampler.height=256", "sampler.width=256"),
        *("dtype=bf16", f"output={place / 'images'}"),
    ]
    generate.run(config.load(generate.GenerateConfig, overrides=settings))
    if not list((place / "images").rglob("*.png")):
        sys.exit("no image was made")


def memory(field: str) -> int:
    """Of this process, bytes: VmRSS now, VmHWM at its most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    sys.exit(f"this kernel does not tell {field}: the drill runs on Linux")


def forget_peak() -> None:
    """From now on VmHWM is the most since now."""
    Path("/proc/self/clear_refs").write_text("5")


def make_model(folder: Path, *, tiny: bool, widths: tuple[int, int, int] | None = None) -> None:
    """Write an SDXL folder in fp16 with random weights; no more than one file's are held.

    Args:
        folder: created.
        tiny: every width cut down.
        widths: of the network; None is the true ones.
    """
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        narrow = {} if widths is None else {"block_out_channels": widths}
        unet = UNet2DConditionModel(**{**UNET, **narrow, **(TINY_UNET if tiny else {})})
        vae = AutoencoderKL(**{**VAE, **(TINY_VAE if tiny else {})})
    for name, network in (("unet", unet), ("vae", vae)):
        network.save_config(folder / name)
        write_weights(folder / name, "diffusion_pytorch_model", network.state_dict())
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    sizes = TINY_ENCODERS if tiny else ENCODERS
    for ending, model_class, size in zip(("", "_2"), classes, sizes, strict=True):
        settings = CLIPTextConfig(**size, architectures=[model_class.__name__])
        with torch.device("meta"):
            encoder = model_class(settings)
        settings.save_pretrained(folder / f"text_encoder{ending}")
        named = {  # as every version of transformers reads it
            name if name.startswith("text_") else f"text_model.{name}": value
            for name, value in encoder.state_dict().items()
            if not name.endswith("position_ids")
        }
        write_weights(folder / f"text_encoder{ending}", "model", named)
        write_tokenizer(folder / f"tokenizer{ending}")
        index |= {
            f"text_encoder{ending}": ["transformers", model_class.__name__],
            f"tokenizer{ending}": ["transformers", "CLIPTokenizer"],
        }
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    ).save_config(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def write_weights(folder: Path, stem: str, blank: Mapping[str, torch.Tensor]) -> None:
    """Random weights in place of blank ones, in as many files as it takes."""
    from safetensors.torch import save_file

    shards = list(_shards(blank))
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
        file = f"{stem}{part}.safetensors"
        values = {name: random_weight(name, value.shape) for name, value in shard.items()}
        save_file(values, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _shards(blank: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    for name, value in blank.items():
        if shard and 2 * sum(v.numel() for v in (*shard.values(), value)) > SHARD:
            yield shard
            shard = {}
        shard[name] = value
    yield shard


def random_weight(name: str, shape: torch.Size) -> torch.Tensor:
    """Of a size that neither grows nor dies from layer to layer: uniform, with a variance of a
    third over the number of inputs; norms are those that a network starts with."""
    if len(shape) < 2:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.float16)
    bound = 0.02 if "embedding" in name else 1 / math.sqrt(math.prod(shape[1:]))
    numbers = _numbers().roll(len(name) * 1009)
    count = math.prod(shape)
    return (numbers.repeat(math.ceil(count / len(numbers)))[:count] * bound).reshape(shape)


@functools.cache
def _numbers() -> torch.Tensor:
    """A million numbers between -1 and 1, of which all weights are made: it takes a tenth of the
    time of new ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2**20 + 7, generator=generator).mul(2).sub(1).half()


def write_tokenizer(folder: Path) -> None:
    """Every word is spelled out in letters; the start and the end have the numbers of CLIP."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    characters = string.ascii_lowercase + string.digits + string.punctuation
    vocabulary = {
        token: i for i, token in enumerate(c + e for e in ("", "</w>") for c in characters)
    }
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=77).save_pretrained(folder)


def make_pairs(folder: Path) -> None:
    """Pairs of noise with captions, as one JSON line each."""
    from PIL import Image

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(PAIRS):
        row = {"prompt": f"a red fox in the snow, number {number}"}
        for side in ("chosen", "rejected"):
            pixels = torch.randint(0, 256, (256, 256, 3), generator=generator, dtype=torch.uint8)
            row[side] = f"{number}_{side}.png"
            Image.fromarray(pixels.numpy()).save(folder / row[side])
        rows.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--tiny", action="store_true", help="every width cut down")
    parser.add_argument("--full", action="store_true", help="also load all weights with a copy")
    parser.add_argument("--processes", type=int, default=1, help="that train together")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage is None:
        main(given.folder, tiny=given.tiny, full=given.full, processes=given.processes)
    else:
        measure(given.stage, given.settings, given.result)
