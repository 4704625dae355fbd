"""Kill workers of shared jobs at random moments: is anything lost or doubled?

    python scripts/kill_workers.py --kills 20

A trial is one job (generate, score, evaluate, synthesise, precompute; on the playground) by two
processes. One to five times a random one of them is killed (SIGKILL) at a random moment: PyTorch's
launcher starts them again, three times; after the fourth the command ends with an error. Then the
same command is given again. The results have to be, byte for byte, those of one process, and no
list may have a line twice. Trials go on until so many kills of every job have been.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
from shared_jobs import JOBS, command, doubled, prepare, results

from diffalign.cli import app
from diffalign.engines import local
from diffalign.errors import DiffalignError

MOST_KILLS = 5
"""In one trial."""


def run(words: list[str]) -> str:
    """Run a command in this process; gives what it refused, or nothing."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            app(words, standalone_mode=False)
    except DiffalignError as error:
        return str(error)
    return ""


def workers() -> list[psutil.Process]:
    """The workers that PyTorch's launcher started for this process."""
    return [child for child in psutil.Process().children() if _is_worker(child)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return local.__name__ in process.cmdline()
    except psutil.Error:
        return False


class Killer(threading.Thread):
    """Kills random workers until told to stop."""

    def __init__(self, chance: random.Random, most: int, *, seconds: float) -> None:
        """Args:
        chance: of moments and victims.
        most: kills.
        seconds: a worker lives at most so long before its kill.
        """
        super().__init__(daemon=True)
        self.kills, self.over = 0, threading.Event()
        self._chance, self._most, self._seconds = chance, most, seconds

    def run(self) -> None:
        while self.kills < self._most and not self.over.is_set():
            if not workers():
                time.sleep(0.01)
                continue
            self.over.wait(self._chance.uniform(0, self._seconds))
            victims = workers()
            if victims and not self.over.is_set():
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._chance.choice(victims).send_signal(signal.SIGKILL)
                    self.kills += 1


def trial(
    words: list[str], output: Path, expected: dict[str, bytes], killer: Killer
) -> tuple[str, bool]:
    """Run a command whose workers are killed, and again; gives what is wrong, and whether the first
    one gave up."""
    killer.start()
    refused = run(words)
    killer.over.set()
    killer.join()
    if refused and "died" not in refused:
        return f"ended with: {refused}", False
    if again := run(words):
        return f"the second time: {again}", bool(refused)
    found = results(output)
    different = [n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)]
    return ", ".join([*different, *doubled(output)]), bool(refused)


def of_job(job: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """Do the trials of a job; gives what failed."""
    chance = random.Random(f"{options.seed} {job}")
    place = prepare(folder / "place", items=options.items)
    one = folder / "one"
    if refused := run(command(job, place, one)):
        sys.exit(f"{job}: {refused}")
    expected = results(one)
    began = time.monotonic()
    if refused := run([*command(job, place, folder / "two"), "--processes", "2"]):
        sys.exit(f"{job}: {refused}")
    seconds = time.monotonic() - began
    kills = gave_up = trials = 0
    failed: list[str] = []
    while kills < options.kills:
        trials += 1
        output = folder / f"trial-{trials:03d}"
        words = [*command(job, place, output), "--processes", "2"]
        most = min(chance.randint(1, MOST_KILLS), options.kills - kills)
        killer = Killer(chance, most, seconds=seconds)
        wrong, refused_once = trial(words, output, expected, killer)
        kills += killer.kills
        gave_up += refused_once
        if wrong:
            failed.append(f"{job}, trial {trials}: {wrong}")
        else:
            shutil.rmtree(output)
    print(
        f"{job}: {kills} kills in {trials} trials, of which {gave_up} gave up before the second "
        f"start; {trials - len(failed)} of {trials} ended with the same bytes",
        flush=True,
    )
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="Of every job.")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--items", type=int, default=12, help="Prompts, images, questions.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for job in options.jobs:
            folder = Path(temporary).resolve() / job
            failed += of_job(job, folder, options)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
