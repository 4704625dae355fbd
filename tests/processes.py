"""`diffalign` in processes of their own: quick to start, ended by the test, waited for patiently.

They are forked from a server that has imported the libraries once, which takes six seconds of a
core each time otherwise. Nothing here depends on how fast the machine is: only a test that fails
waits for as long as `PATIENCE_S`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PATIENCE_S = 900.0
"""How long anything is waited for."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["diffalign.jobs.train", "diffalign.jobs.generate"])


def wait_until(reached: Callable[[], bool], process: BaseProcess, log: Path) -> None:
    """Wait until something is so; fail with the log where the process ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert process.is_alive(), f"the process ended by itself:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"waited for nothing:\n{log.read_text()}"
        time.sleep(0.01)


@contextlib.contextmanager
def started(
    *arguments: str,
    log: Path,
    moment: Callable[[], bool] | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[BaseProcess]:
    """Run `diffalign ARGUMENTS`; the process is ended with the `with` block.

    Args:
        arguments: of the command line.
        log: what it prints is appended here.
        moment: the process is killed (SIGKILL) as soon as this is so. It is asked before every file
            is opened or renamed, so no moment that files tell is missed. Of a module's level, or a
            `functools.partial` of such a function.
        env: changes to the environment.
    """
    changed = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    process: Any = _context.Process(target=_run, args=(arguments, log, changed, moment))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def ended(process: BaseProcess, log: Path) -> int:
    """Wait for the end; negative where a signal ended it."""
    process.join(PATIENCE_S)
    assert process.exitcode is not None, f"the process does not end:\n{log.read_text()}"
    return process.exitcode


def run_ranks(*arguments: str, log: Path, processes: int = 2) -> None:
    """Run `diffalign ARGUMENTS` in a process group, as `--processes` does, to its good end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                started(*arguments, log=log, env=group | {"RANK": rank, "LOCAL_RANK": rank})
            )
            for rank in map(str, range(processes))
        ]
        assert [ended(rank, log) for rank in ranks] == [0] * processes, log.read_text()


def _run(
    arguments: tuple[str, ...],
    log: Path,
    env: dict[str, str],
    moment: Callable[[], bool] | None,
) -> None:
    os.environ.clear()
    os.environ.update(env)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from diffalign import cli

    torch.set_num_threads(1)  # told too late by the environment: torch is there already
    # Workers as the command has them: those of another server would outlive a killed run.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = ["diffalign", *arguments]
    if moment is not None:
        _die_at(moment)
    cli.main()


def _die_at(moment: Callable[[], bool]) -> None:
    looking = threading.Lock()

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename") and looking.acquire(blocking=False):
            try:
                if moment():
                    os.kill(os.getpid(), signal.SIGKILL)
            finally:
                looking.release()

    sys.addaudithook(look)


def has_lines(file: Path, number: int) -> bool:
    """Whether a file has so many whole lines."""
    return file.is_file() and file.read_bytes().count(b"\n") >= number


def has_files(folder: Path, number: int) -> bool:
    """Whether a folder has so many files of JSON lines: blocks that are done."""
    return sum(1 for _ in folder.glob("*.jsonl")) >= number
