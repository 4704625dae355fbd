"""Time and memory of training against batch, resolution, pairs, images per prompt and processes.

    OMP_NUM_THREADS=1 python scripts/bench_scale.py                        # some three minutes
    OMP_NUM_THREADS=1 python scripts/bench_scale.py --only batch --rounds 5
    OMP_NUM_THREADS=1 python scripts/bench_scale.py --tiny                 # two steps of each

Trains the playground's tiny SDXL for a few steps at each size of one axis, everything else kept,
each time in a process of its own; all sizes in turn, round after round, so that whatever else the
machine does meets all of them. Prints a Markdown table for docs/scale.md, then one line of JSON.
Seconds are of the CPU, but for several processes, which wait for one another: there, of the clock.
Memory is the peak above what the process held before, Linux alone.

An exponent is the power of the size by which a figure grows, fitted over the larger half of the
sizes (three at least), with its 95 % interval: 1 is proportional, 2 a square. What is fixed
flattens it, most of all where sizes are small.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from bench_data import jpeg
from drill_sdxl import forget_peak, memory
from measuring import exponent, machine, on_this_machine, rounded
from rich.console import Console

from diffalign import config
from diffalign.console import silence_libraries
from diffalign.intervals import Interval
from diffalign.training import build
from diffalign.training.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
DPO = ROOT / "configs/playground/diffusion_dpo.yaml"
ONLINE = ROOT / "configs/playground/d3po.yaml"
PIXELS = 16
"""Sides of the JPEGs: what grows here is not their decoding."""
WARM_UP = 2
"""Steps before those that are measured."""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["datasets", "diffalign.jobs.train"])  # imported once, for all


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One thing that grows, and what is measured of it."""

    title: str
    sizes: Sequence[int]
    tiny: Sequence[int]
    """In place of the sizes with `--tiny`."""
    settings: str
    """Of a size; SIZE or its root SIDE is put in, and DATA, a folder of pairs."""
    figures: Mapping[str, str]
    """Names of what is measured, and of the columns."""
    config: Path = DPO
    steps: int = 6
    pairs: int = 256
    """Of the data, where they are not what grows."""


USUAL = {"cpu": "a step, CPU s", "mib": "peak, MiB"}
OF_ROUNDS = {
    "first": "sampling, scoring and pairing a round, CPU s",
    "samples": "rows to train on, of a round",
    "round": "the whole round, CPU s",
    "mib": "peak, MiB",
}
OF_A_ROUND = (
    "rollouts.prompts_per_round=8 rollouts.prompts_per_batch=2 rollouts.images_per_prompt=SIZE "
    "rollouts.pairs=all rollouts.trained_steps=null training.samples_per_device=2 "
    "training.accumulation=1 likelihood.process.steps=4 likelihood.process.guidance=2"
)
AXES = {
    "batch": Axis(
        title="pairs a step (`samples_per_device`)",
        sizes=(1, 4, 8, 16, 32),
        tiny=(1, 2, 3),
        settings="data.path=DATA training.samples_per_device=SIZE",
        figures=USUAL,
    ),
    "resolution": Axis(
        title="pixels of an image (`resolution` squared)",
        sizes=(64**2, 128**2, 192**2, 256**2),
        tiny=(64**2, 96**2, 128**2),
        settings="data.path=DATA data.resolution=SIDE training.samples_per_device=2",
        figures=USUAL,
        steps=3,
    ),
    "pairs": Axis(
        title="pairs in the data set",
        sizes=(1_000, 4_000, 16_000, 64_000),
        tiny=(10, 20, 40),
        settings="data.path=DATA training.samples_per_device=4",
        figures={"open": "to open, CPU s", **USUAL},
    ),
    "images": Axis(
        title="images per prompt of a round, `rollouts.pairs: all`",
        sizes=(2, 4, 8, 16),
        tiny=(3, 4, 5),
        settings=OF_A_ROUND,
        figures=OF_ROUNDS,
        config=ONLINE,
        steps=4,
    ),
    "best_worst": Axis(
        title="images per prompt of a round, `rollouts.pairs: best_worst`",
        sizes=(4, 8, 16),
        tiny=(3, 4, 5),
        settings=f"{OF_A_ROUND} rollouts.pairs=best_worst",
        figures=OF_ROUNDS,
        config=ONLINE,
        steps=4,
    ),
    "processes": Axis(
        title="processes (gloo), each with 8 pairs a step",
        sizes=(1, 2),
        tiny=(1, 2),
        settings="data.path=DATA training.samples_per_device=8",
        figures={"clock": "a step, s by the clock", **USUAL},
    ),
}


def settings_of(axis: Axis, size: int, data: Path) -> list[str]:
    """Overrides of the config for one size."""
    text = axis.settings.replace("SIZE", str(size)).replace("SIDE", str(round(size**0.5)))
    return [
        *(word.replace("DATA", str(data)) for word in text.split()),
        *(("data.workers=0",) if axis.config == DPO else ()),
    ]


def write_pairs(folder: Path, pairs: int) -> Path:
    """A table of so many pairs of the same two JPEGs, each pair under a caption of its own."""
    if folder.exists():
        return folder
    generator = np.random.default_rng(0)
    images = [jpeg(PIXELS, generator) for _ in range(2)]
    columns = {
        "caption": [f"image {number}" for number in range(pairs)],
        **{f"jpg_{side}": [image] * pairs for side, image in enumerate(images)},
        "label_0": [1.0] * pairs,
        "label_1": [0.0] * pairs,
    }
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "pairs.parquet", row_group_size=1000)
    return folder


class Moment(NamedTuple):
    """Seconds of this process, and of the clock."""

    cpu: float
    clock: float

    @classmethod
    def now(cls) -> Moment:
        return cls(time.process_time(), time.perf_counter())


def train(config_file: Path, settings: Sequence[str], steps: int) -> dict[str, float] | None:
    """Train in this process; figures of the main rank, None on others."""
    forget_peak()
    held, quiet = memory("VmRSS"), Console(quiet=True)
    length = f"training.optimizer_steps={WARM_UP + steps}"
    run = config.load(RunConfig, config_file, [*settings, length])
    run.output.mkdir(parents=True, exist_ok=True)
    accelerator = build.build_accelerator(run)
    started = Moment.now()
    source = build.build_source(run, quiet, skipped=None)
    opened = Moment.now()
    trainer = build.build_trainer(run, accelerator, source, quiet)
    batches, after_step = type(source).__iter__, trainer.hooks.after_step
    first, ticks = [], []

    def reading(self: Any) -> Iterator[Any]:
        following, before = batches(self), time.process_time()
        batch = next(following)  # of rollouts, a round is sampled before it
        first.append(time.process_time() - before)
        yield batch
        yield from following

    def ticking(*given: Any) -> dict[str, float]:
        figures: dict[str, float] = after_step(*given)
        ticks.append(Moment.now())
        return figures

    trainer.hooks.after_step = ticking  # type: ignore[method-assign]
    with patch.object(type(source), "__iter__", reading):
        if not trainer.fit():
            raise SystemExit("stopped on request: nothing is measured")
    before, after = ticks[WARM_UP - 1], ticks[-1]
    found = {
        "open": opened.cpu - started.cpu,
        "first": first[0],
        "cpu": (after.cpu - before.cpu) / steps,
        "clock": (after.clock - before.clock) / steps,
        "mib": (memory("VmHWM") - held) / 2**20,
    }
    rows = source.figures().get("round/steps")
    if rows is not None:
        each = run.training.samples_per_device * run.training.accumulation
        found |= {"samples": rows, "round": first[0] + rows / each * found["cpu"]}
    main_rank = accelerator.is_main_process
    del trainer
    build.end(accelerator)
    return found if main_rank else None


def train_as_a_process(
    environment: Mapping[str, str],
    config_file: Path,
    settings: Sequence[str],
    steps: int,
    result: Path,
) -> None:
    """Train in a new process, one of a group where the environment says so, and write figures."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    silence_libraries()
    datasets.config.HF_DATASETS_CACHE = tempfile.mkdtemp(dir=result.parent)  # a first opening
    datasets.disable_progress_bars()
    found = train(config_file, settings, steps)
    if found is not None:
        result.write_text(json.dumps(found))


def measured(
    config_file: Path, settings: Sequence[str], *, steps: int, processes: int, folder: Path
) -> dict[str, float]:
    """Figures of a run in new processes.

    Raises:
        SystemExit: one of them failed.
    """
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    given = (config_file, settings, steps, result)
    group: dict[str, str] = {}
    if processes > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
        group |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started = []
    for rank in map(str, range(processes)):
        mine = {**group, "RANK": rank, "LOCAL_RANK": rank} if group else {}
        started.append(CONTEXT.Process(target=train_as_a_process, args=(mine, *given)))
    for process in started:
        process.start()
    for process in started:
        process.join()
    if not result.is_file():
        raise SystemExit(f"a run with {' '.join(settings)} failed")
    found: dict[str, float] = json.loads(result.read_text())
    return found


def table(axis: Axis, found: Mapping[int, Sequence[Mapping[str, float]]]) -> str:
    """The figures of an axis: medians of the rounds, and the exponents in the last line."""
    lines = [f"| {axis.title} | {' | '.join(axis.figures.values())} |"]
    lines.append("|---" * (1 + len(axis.figures)) + "|")
    for size, rounds in found.items():
        cells = []
        for name in axis.figures:
            values = [figures[name] for figures in rounds]
            low, high = rounded(min(values)), rounded(max(values))
            middle = f"{rounded(statistics.median(values)):,}"
            cells.append(middle if low == high else f"{middle} ({low:,} to {high:,})")
        lines.append(f"| {size:,} | {' | '.join(cells)} |")
    powers = [growth(found, name) for name in axis.figures]
    if any(powers):
        cells = [
            "" if p is None else f"{p[0]:.2f} ({p[1].low:.2f} to {p[1].high:.2f})" for p in powers
        ]
        lines.append(f"| exponent | {' | '.join(cells)} |")
    return "\n".join(lines)


def growth(
    found: Mapping[int, Sequence[Mapping[str, float]]], name: str
) -> tuple[float, Interval] | None:
    """The exponent of a figure over the larger half of the sizes; None with fewer than three."""
    sizes = sorted(found)[-max(3, (len(found) + 1) // 2) :]
    if len(sizes) < 3:
        return None
    points = [(size, figures[name]) for size in sizes for figures in found[size]]
    if min(value for _, value in points) <= 0:
        return None
    return exponent(*zip(*points, strict=True))


def main(
    only: Annotated[list[str] | None, typer.Option(help=", ".join(AXES))] = None,
    rounds: Annotated[int, typer.Option(help="Of all sizes, one after the other.", min=1)] = 2,
    tiny: Annotated[bool, typer.Option(help="Few sizes, two steps, one round.")] = False,
) -> None:
    """Print the tables and the JSON."""
    for name in only or ():
        if name not in AXES:
            raise SystemExit(f"--only {name}: there is {', '.join(AXES)}")
    axes = {name: AXES[name] for name in only or AXES}
    found: dict[str, dict[int, list[dict[str, float]]]] = {
        name: {size: [] for size in (axis.tiny if tiny else axis.sizes)}
        for name, axis in axes.items()
    }
    with tempfile.TemporaryDirectory(prefix="bench_scale-") as scratch:
        folder = Path(scratch)
        for number in range(1 if tiny else rounds):
            for name, axis in axes.items():
                for size, figures in found[name].items():
                    pairs = size if name == "pairs" else min(axis.pairs, 16 if tiny else 256)
                    data = write_pairs(folder / f"data-{pairs}", pairs)
                    output = f"output={folder}/run-{name}-{size}-{number}"
                    figures.append(
                        measured(
                            axis.config,
                            [*settings_of(axis, size, data), output, "optimizer.warmup_steps=0"],
                            steps=2 if tiny else axis.steps,
                            processes=size if name == "processes" else 1,
                            folder=folder,
                        )
                    )
    here = machine()
    print(on_this_machine(here))
    for name, axis in axes.items():
        print(f"\n{table(axis, found[name])}")
    exponents = {
        name: {figure: growth(found[name], figure) for figure in axis.figures}
        for name, axis in axes.items()
    }
    print("\n" + json.dumps({"machine": here, "figures": found, "exponents": exponents}))


if __name__ == "__main__":
    typer.run(main)
