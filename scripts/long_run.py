"""Do memory, descriptors, threads and the time of a step stay flat over a long run?

    python scripts/long_run.py                # 5,000 steps on the playground
    python scripts/long_run.py --tiny --out runs/long

Trains with previews, held-out evaluation, checkpoints, an average, a log a step, and a worker.
Every 20 steps it notes the memory that the process holds (resident, without its workers), its open
descriptors, threads and children, and the CPU time since. Over the run less its first fifth, a line
is fitted to each; it is flat where the line rises by less than `FLAT` a thousand steps, or, of the
time of a step, by less than three of its standard errors. Prints a Markdown table for
docs/performance.md and writes `long_run.json`. The exit status is 1 where something is not flat.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
from accelerate.state import AcceleratorState

from diffalign import config
from diffalign.jobs import train
from diffalign.training import build
from diffalign.training.config import RunConfig
from diffalign.training.hooks.base import AbstractHook, StepOutcome, TrainingRun

ROOT = Path(__file__).parents[1]
NOTED_EVERY = 20
LEFT_OUT = 0.2
"""The first part of a run: caches fill, libraries load what they need."""
SETTINGS = (
    "training.samples_per_device=1",
    "training.log_every=1",
    "training.checkpoint_every=50",
    "training.keep_checkpoints=2",
    "training.ema_decay=0.99",
    "data.workers=1",
    "data.holdout=0.02",
    "evaluation={every: 250, pairs: 4}",
    "previews={every: 250, count: 1, steps: 2}",
    "tracking.trackers=[tensorboard]",
)
MEASURES = {
    "memory": "MiB",
    "descriptors": "",
    "threads": "",
    "children": "",
    "step": "ms of CPU",
}
"""What is noted, and its unit."""
FLAT = {"memory": 0.005, "descriptors": 0.005, "threads": 0.005, "children": 0.005, "step": 0.01}
"""Rise in a thousand steps that counts as none, as a share of the mean."""


class Notes(AbstractHook):
    """What the process holds as it trains."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[dict[str, float]] = []
        self.before = time.process_time()

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> Mapping[str, float]:
        """Note it, every so many steps."""
        if run.step % self.every == 0:
            now = time.process_time()
            self.rows.append(
                {
                    "steps": run.step,
                    "memory": resident_mib(),
                    "descriptors": entries("/proc/self/fd"),
                    "threads": entries("/proc/self/task"),
                    "children": len(children()),
                    "step": 1000 * (now - self.before) / self.every,
                }
            )
            self.before = now
        return {}


def resident_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def entries(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


def children() -> list[str]:
    tasks = Path("/proc/self/task").glob("*/children")
    return [child for task in tasks for child in task.read_text().split()]


def fitted(rows: list[dict[str, float]], name: str) -> dict[str, float | bool]:
    """Mean and rise of a measure.

    Steps cost what is due in them, so each step time is the median of ten notes.
    """
    rows = rows[int(LEFT_OUT * len(rows)) :]
    steps = np.array([row["steps"] for row in rows]) / 1000
    values = np.array([row[name] for row in rows])
    if name == "step" and (parts := len(rows) // 10) > 2:
        steps, values = (
            np.array([of(part) for part in np.array_split(column, parts)])
            for column, of in ((steps, np.mean), (values, np.median))
        )
    centred = steps - steps.mean()
    slope = float(centred @ values / (centred @ centred))
    rest = values - values.mean() - slope * centred
    error = float(np.sqrt((rest @ rest) / max(1, len(rest) - 2) / (centred @ centred)))
    mean = float(values.mean())
    return {
        "first": float(values[0]),
        "mean": mean,
        "last": float(values[-1]),
        "rise_in_1000_steps": slope,
        "standard_error": error,
        "is_flat": slope <= max(FLAT[name] * mean, 3 * error if name == "step" else 0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--config", default="configs/smoke/diffusion_dpo_sdxl.yaml")
    parser.add_argument("--tiny", action="store_true", help="100 steps: does it run?")
    parser.add_argument("--out", type=Path, help="Folder for long_run.json. Default: here.")
    options = parser.parse_args()
    steps = 100 if options.tiny else options.steps
    assets = (f"{name}={ROOT}/assets/playground/{rest}" for name, rest in PLACES.items())
    notes = Notes(5 if options.tiny else NOTED_EVERY)
    with tempfile.TemporaryDirectory() as folder:
        settings = [*SETTINGS, *assets, f"training.optimizer_steps={steps}", f"output={folder}/run"]
        run = config.load(RunConfig, ROOT / options.config, settings)
        open_hooks = build.open_hooks
        with patch.object(build, "open_hooks", lambda *given: [*open_hooks(*given), notes]):
            train.run(run)
    AcceleratorState._reset_state(reset_partial_state=True)
    results = {name: fitted(notes.rows, name) for name in MEASURES}
    place = options.out or Path()
    place.mkdir(parents=True, exist_ok=True)
    content = {"steps": steps, "results": results, "notes": notes.rows}
    (place / "long_run.json").write_text(json.dumps(content, indent=1))
    print(f"| of {steps} steps | first | mean | last | rise in 1,000 steps | flat |")
    print("|---|---|---|---|---|---|")
    for name, found in results.items():
        unit = f", {MEASURES[name]}" if MEASURES[name] else ""
        print(
            f"| {name}{unit} | {found['first']:.1f} | {found['mean']:.1f} | {found['last']:.1f} | "
            f"{found['rise_in_1000_steps']:+.2f} ± {found['standard_error']:.2f} | "
            f"{'yes' if found['is_flat'] else 'NO'} |"
        )
    if not options.tiny and not all(found["is_flat"] for found in results.values()):
        sys.exit(1)


PLACES = {"model.path": "sdxl", "data.path": "preferences"}

if __name__ == "__main__":
    main()
