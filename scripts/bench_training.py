"""Where the time of a training step goes: read, encode, reference, policy, backward, update.

    python scripts/bench_training.py configs/playground/diffusion_dpo.yaml [key.path=value ...]
    python scripts/bench_training.py --steps 2 ...    # instead of 20 measured steps

Prints a Markdown table for docs/performance.md. It is the run's own loop that is timed, its caches
included (`reference=cached`, with the folders that `diffalign precompute` filled): CPU seconds on a
CPU; on a GPU seconds by the clock, waiting for the device where one stage ends and another begins.
A run does not wait, so there its own rate (the last line of its timing.jsonl) is the one to quote,
and this the one that says where to look. Checkpoints are not part of it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from measuring import now
from rich.console import Console

from diffalign import config
from diffalign.training import build
from diffalign.training.checks import check
from diffalign.training.config import RunConfig

WARM_UP = 3
STAGES = (
    READ := "read the batch",
    PREPARE := "encode images and prompts, add noise",
    REFERENCE := "reference",
    POLICY := "policy and loss",
    BACKWARD := "backward",
    UPDATE := "clip and update",
    ELSE := "all else",
)


class Clock:
    """Seconds by stage; of a stage within another one, the inner one's alone."""

    def __init__(self) -> None:
        self.stage = ELSE
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = now()

    def enter(self, stage: str) -> str:
        """Count for this stage from now on; returns the one before."""
        moment = now()
        self.seconds[self.stage] += moment - self.last
        self.last, before, self.stage = moment, self.stage, stage
        return before

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted for a stage."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(before)

        return call


def measure(run: RunConfig, steps: int) -> tuple[Clock, torch.device]:
    """Seconds of the steps after those of the warm-up."""
    accelerator = build.build_accelerator(run)
    quiet = Console(quiet=True)
    source = build.build_source(run, quiet, skipped=None)
    trainer = build.build_trainer(run, accelerator, source, quiet)
    clock = Clock()
    batches, after_step = type(source).__iter__, trainer.hooks.after_step

    def reading(self: Any) -> Iterator[Any]:
        following = clock.timed(READ, batches(self).__next__)
        while True:
            yield following()

    def ticking(*given: Any) -> dict[str, float]:
        figures = after_step(*given)
        clock.enter(ELSE)
        if trainer.step == WARM_UP:
            clock.seconds.clear()
        elif trainer.step == WARM_UP + steps:
            clock.stage = "checkpoint"
        return figures

    with ExitStack() as stack:
        stack.enter_context(patch.object(type(source), "__iter__", reading))
        stack.enter_context(patch.object(trainer.hooks, "after_step", ticking))
        for owner, name, stage in (
            (type(run.likelihood), "prepare", PREPARE),
            (trainer, "_reference", REFERENCE),
            (trainer, "views", POLICY),
            (type(run.objective), "__call__", POLICY),
            (accelerator, "backward", BACKWARD),
            (accelerator, "clip_grad_norm_", UPDATE),
            (trainer, "_update", UPDATE),
        ):
            timed = clock.timed(stage, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, timed))
        if not trainer.fit():
            raise SystemExit("stopped on request: nothing is measured")
    build.end(accelerator)
    return clock, accelerator.device


def main(path: Path, overrides: list[str], steps: int) -> None:
    with TemporaryDirectory() as folder:
        length = f"training.optimizer_steps={WARM_UP + steps}"
        given = (*overrides, f"output={folder}/run", length, "optimizer.warmup_steps=0")
        run = config.load(RunConfig, path, given)
        check(run)
        run.output.mkdir(parents=True)
        clock, device = measure(run, steps)
    seconds = {stage: clock.seconds[stage] for stage in STAGES}
    total = sum(seconds.values())
    pairs = run.training.samples_per_device * run.training.accumulation * steps
    print(f"`{' '.join([str(path), *overrides])}` on {device}, ", end="")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}: {pairs / total:.1f} pairs/s"
    )
    print("\n| stage | ms per step | share |\n|---|---|---|")
    for stage, spent in seconds.items():
        print(f"| {stage} | {1000 * spent / steps:.1f} | {spent / total:.1%} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--steps", type=int, default=20, help="measured, after three to warm up")
    arguments = parser.parse_args()
    main(arguments.config, arguments.overrides, arguments.steps)
