"""How much faster two processes do the blocks of a job than one.

    python scripts/bench_blocks.py

One process and two take turns, one thread each, and do generation and the questions of a benchmark
on the playground. A rate counts from the moment when every process has done its first block, until
the last: loading is left out. The ratio of two to one should be near two on two idle cores; a run
has to last some ten seconds, or a process that loads longer than the other decides it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared_jobs import command, prepare

FILES = {"generate": ".blocks", "evaluate": ".responses.jsonl.blocks"}


def rate(words: list[str], blocks: Path, *, processes: int, items: int) -> float:
    """Blocks a second of a command.

    Args:
        words: of the command line.
        blocks: the folder in which they appear, and which is gone at the end.
        processes: how many.
        items: how many blocks there are.
    """
    command = [sys.executable, "-m", "diffalign", *words, "--processes", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    began: tuple[float, int] | None = None
    last = (0.0, 0)
    with subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            done = sum(1 for _ in blocks.iterdir()) if blocks.is_dir() else 0
            if done > last[1]:
                last = time.perf_counter(), done
            if began is None and done >= 2 * processes:
                began = last
            time.sleep(0.1)  # looking takes time from those who work
        assert process.stderr is not None
        if process.returncode:
            sys.exit(process.stderr.read())
    if began is None or last[1] <= began[1]:
        sys.exit(f"{' '.join(words)}: {last[1]} of {items} blocks were seen: give more --items")
    return (last[1] - began[1]) / (last[0] - began[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--items", type=int, help="Images, and questions; else as many as suit.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", default=list(FILES), choices=list(FILES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        for job in options.jobs:
            items = options.items or ITEMS[job]
            place = prepare(folder / job, items=items)
            rates: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(options.rounds):
                for processes, found in rates.items():
                    output = folder / "out"
                    words = command(job, place, output, *LONGER[job])
                    blocks = output / FILES[job]
                    found.append(rate(words, blocks, processes=processes, items=items))
                    shutil.rmtree(output)
            one, two = (statistics.median(found) for found in rates.values())
            print(
                f"{job}: {one:.2f} blocks/s by one process, {two:.2f} by two: "
                f"{two / one:.2f} times (medians of {options.rounds})",
                flush=True,
            )


ITEMS = {"generate": 200, "evaluate": 4000}
LONGER = {
    "generate": ("sampler.steps=8", "batch_size=2"),
    "evaluate": ("asking.max_new_tokens=16", "asking.batch_size=8"),
}
"""Work of a block that outweighs its files."""


if __name__ == "__main__":
    main()
