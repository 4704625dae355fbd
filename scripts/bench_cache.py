"""Training from encodings and reference values computed once, next to computing them in every step.

    OMP_NUM_THREADS=1 python scripts/bench_cache.py configs/playground/diffusion_dpo.yaml
    OMP_NUM_THREADS=1 python scripts/bench_cache.py ... --peer train_diffusion_dpo_sdxl.py

Prints a Markdown table for docs/performance.md: with LoRA and in full, alternately in one process,
so that whatever else the machine does meets all of them. Times are CPU seconds of whole steps,
reading of the data included. Fails if a loss from the caches is not the loss without them.

The peer is diffusers' examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py,
unchanged, on the same model, pairs and batch. Around it are replaced: its progress bar, by a clock;
its trackers, by none; wandb, by an empty module where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import statistics
import sys
import types
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import accelerate
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from accelerate.state import AcceleratorState
from measuring import now
from rich.console import Console

from diffalign import config
from diffalign.jobs import precompute
from diffalign.training import build
from diffalign.training.config import RunConfig

WARM_UP = 3
RANK = 8
LORA = f"model.lora={{rank: {RANK}}}"
VISITS = 2
"""Of a pair, in all runs: few to precompute, and enough for the steps of one measurement."""
CLOSE = 1e-6
UNCACHED, CACHED, PEER = "without caches", "cached", "diffusers' script"


class Clock:
    """Seconds (`measuring.now`) of a number of steps, after those of the warm-up."""

    def __init__(self, steps: int) -> None:
        self.last, self.step, self.seconds = WARM_UP + steps, 0, 0.0

    def tick(self) -> None:
        """One more step is done."""
        self.step += 1
        if self.step in (WARM_UP, self.last):
            self.seconds = now() - self.seconds


class Steps(NamedTuple):
    """Steps of a run, measured."""

    seconds: float
    losses: list[float]
    trained: int
    """Numbers that it trains."""


def ours(run: RunConfig, steps: int) -> Steps:
    """Seconds of the steps of a run, its losses, and how many numbers it trains."""
    AcceleratorState._reset_state(reset_partial_state=True)
    quiet, clock = Console(quiet=True), Clock(steps)
    accelerator = build.build_accelerator(run)
    run.output.mkdir(parents=True)
    trainer = build.build_trainer(
        run, accelerator, build.build_source(run, quiet, skipped=None), quiet
    )
    after_step = trainer.hooks.after_step

    def timed(run: Any, outcome: Any) -> dict[str, float]:
        clock.tick()
        return after_step(run, outcome)

    trainer.hooks.after_step = timed  # type: ignore[method-assign]
    if not trainer.fit():
        raise SystemExit("stopped on request: nothing is measured")
    rows = map(json.loads, (run.output / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    trained = sum(parameter.numel() for _, parameter in trainer.model.trained_parameters())
    del trainer
    build.end(accelerator)
    return Steps(clock.seconds, losses, trained)


def load_peer(path: Path) -> types.ModuleType:
    """The script as a module; nothing of its text is changed."""
    spec = importlib.util.spec_from_file_location("peer", path)
    assert spec is not None and spec.loader is not None
    peer = importlib.util.module_from_spec(spec)
    absent = importlib.util.find_spec("wandb") is None
    if absent:
        sys.modules["wandb"] = types.ModuleType("wandb")
        sys.modules["wandb"].__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    try:
        spec.loader.exec_module(peer)
    finally:
        if absent:
            del sys.modules["wandb"]
    return peer


def peers(peer: Any, run: Any, steps: int, folder: Path) -> float:
    """CPU seconds of the same steps of the peer."""
    AcceleratorState._reset_state(reset_partial_state=True)
    clock = Clock(steps)
    peer.tqdm = lambda *_, **__: types.SimpleNamespace(
        update=lambda _: clock.tick(), set_postfix=lambda **_: None
    )
    peer.Accelerator = lambda **settings: accelerate.Accelerator(**{**settings, "log_with": None})
    batch = run.training.samples_per_device
    settings = {
        "pretrained_model_name_or_path": run.model.path,
        "dataset_name": run.data.path,
        "dataset_split_name": "train",
        "cache_dir": folder / "arrow",
        "output_dir": folder / "peer",
        "resolution": run.data.resolution,
        "train_batch_size": batch,
        "vae_encode_batch_size": run.model.images_per_encoding,
        "rank": RANK,
        "beta_dpo": round(run.objective.beta),  # it takes whole numbers
        "learning_rate": run.optimizer.lr,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": WARM_UP + steps,
        "checkpointing_steps": 10**9,
        "seed": run.seed,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    peer.main(peer.parse_args([*words, "--no_hflip"]))
    return clock.seconds


def write_pairs(source: Path, many: int, folder: Path) -> Path:
    """A data set of the first pairs that are no ties: the peer knows none."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted(source.glob("*.parquet"))])
    table = table.filter(pc.not_equal(table["label_0"], 0.5))[:many]
    (folder / "pairs").mkdir()
    pq.write_table(table, folder / "pairs/train.parquet")
    return folder / "pairs"


def main(
    path: Path, overrides: list[str], *, steps: int, rounds: int, pairs: int, peer: Path | None
) -> None:
    script = None if peer is None else load_peer(peer)
    with TemporaryDirectory() as name:
        folder = Path(name)
        given = config.load(RunConfig, path, overrides)
        assert given.data is not None, f"{path} trains on no pairs of images"
        shared = [
            *overrides,
            f"data.path={write_pairs(Path(given.data.path), pairs, folder)}",
            f"data.visits={VISITS}",
            "data.workers=0",
            "optimizer.warmup_steps=0",
            "optimizer.schedule=constant",
            f"training.optimizer_steps={WARM_UP + steps}",
            f"encodings_cache={folder}/encodings",
        ]
        numbers = iter(range(10**6))

        def load(*more: str) -> RunConfig:
            output = f"output={folder}/run-{next(numbers)}"
            return config.load(RunConfig, path, [*shared, *more, output])

        trainings = {"LoRA": (LORA,), "full": ("model.lora=null",)}
        cached = {}
        for training, settings in trainings.items():
            known = f"reference_cache={folder}/reference-{training}"
            precompute.run(load(*settings, known))
            cached[training] = (*settings, known, "model.encoders=cached", "reference=cached")

        seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        losses: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for training, settings in trainings.items():
                for way, chosen in ((UNCACHED, settings), (CACHED, cached[training])):
                    once, losses[training, way], _ = ours(load(*chosen), steps)
                    seconds[training, way].append(once)
                if script is not None and training == "LoRA":
                    seconds[training, PEER].append(peers(script, load(*settings), steps, folder))
    for training in trainings:
        ways = losses[training, UNCACHED], losses[training, CACHED]
        apart = max(abs(a - b) for a, b in zip(*ways, strict=True))
        if not apart <= CLOSE:
            raise SystemExit(f"{training}: losses with and without caches differ by {apart:.1e}")
    batch = given.training.samples_per_device
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {rounds} rounds of "
        f"{steps} steps of {batch} pairs\n\n"
        "| training | path | pairs per CPU second | cached, in multiples of it |\n|---|---|---|---|"
    )
    for (training, way), spent in seconds.items():
        ratios = [a / b for a, b in zip(spent, seconds[training, CACHED], strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        times = "1" if way == CACHED else f"{middle:.2f} ({low:.2f} to {high:.2f})"
        rate = batch * steps / statistics.median(spent)
        print(f"| {training} | {way} | {rate:.1f} | {times} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--steps", type=int, default=20, help="measured, after three to warm up")
    parser.add_argument("--rounds", type=int, default=5, help="of all ways, one after the other")
    parser.add_argument("--pairs", type=int, default=256, help="the first ones of the data set")
    parser.add_argument("--peer", type=Path, help="diffusers' train_diffusion_dpo_sdxl.py")
    given = parser.parse_args()
    main(
        given.config,
        given.overrides,
        steps=given.steps,
        rounds=given.rounds,
        pairs=given.pairs,
        peer=given.peer,
    )
