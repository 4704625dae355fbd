"""Where the time of a training step goes: load, encode, reference, policy, backward, update.

    python scripts/bench_training.py configs/playground/diffusion_dpo.yaml [key.path=value ...]
    python scripts/bench_training.py --steps 2 ...    # instead of 20 measured steps

Prints a Markdown table for docs/performance.md. Stages are timed one by one, waiting for the device
after each; a run does not wait, so its own rate (the last line of its timing.jsonl) is the one to
quote, and this the one that says where to look.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from diffalign import config
from diffalign.objectives.base import Likelihoods
from diffalign.training import build
from diffalign.training.checks import check
from diffalign.training.config import RunConfig

WARM_UP = 3


def main(path: Path, overrides: list[str], steps: int) -> None:
    with TemporaryDirectory() as folder:
        run = config.load(RunConfig, path, [*overrides, f"output={folder}/run"])
        check(run)
        accelerator = build.build_accelerator(run)
        quiet = Console(quiet=True)
        source = build.build_source(run, quiet, skipped=None)
        trainer = build.build_trainer(run, accelerator, source, quiet)
        seconds: dict[str, float] = defaultdict(float)

        @contextmanager
        def stage(name: str, counted: bool) -> Iterator[None]:
            started = time.perf_counter()
            yield
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] += (time.perf_counter() - started) * counted

        batches = iter(source)
        for step in range(WARM_UP + steps):
            counted = step >= WARM_UP
            with stage("load and decode", counted):
                batch = next(batches)
            with stage("encode images and prompts, add noise", counted):
                prepared = run.likelihood.prepare(trainer.model, batch)
            reference = {}
            if run.objective.needs_reference:
                with stage("reference", counted), torch.no_grad(), trainer.model.reference():
                    reference = run.likelihood.evaluate(trainer.model, prepared)
            with stage("policy", counted):
                policy = run.likelihood.evaluate(trainer.model, prepared)
            views = {name: Likelihoods(policy[name], reference.get(name)) for name in policy}
            with stage("backward", counted):
                accelerator.backward(run.objective(views).loss.mean())
            with stage("clip and update", counted):
                accelerator.clip_grad_norm_(trainer.parameters, trainer.max_grad_norm)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()

    total = sum(seconds.values())
    pairs = run.training.samples_per_device * steps
    print(f"`{' '.join([str(path), *overrides])}` on {accelerator.device}, ", end="")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}: {pairs / total:.1f} pairs/s"
    )
    print("\n| stage | ms per step | share |\n|---|---|---|")
    for name, spent in seconds.items():
        print(f"| {name} | {1000 * spent / steps:.1f} | {spent / total:.0%} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--steps", type=int, default=20, help="measured, after three to warm up")
    arguments = parser.parse_args()
    main(arguments.config, arguments.overrides, arguments.steps)
