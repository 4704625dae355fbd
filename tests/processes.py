"""`diffalign` in processes of their own: quick to start, ended by the test, waited for patiently.

They are forked from a server that has imported the libraries once, which takes six seconds of a
core each time otherwise; `warm_python` does that for processes which a launcher starts. Nothing
here depends on how fast the machine is: only a test that fails waits for as long as `PATIENCE_S`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from diffalign.processes import PARENT, end_with_parent

PATIENCE_S = 900.0
"""How long anything is waited for."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["diffalign.jobs.train", "diffalign.jobs.generate"])

_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
said = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(said).to_bytes(8, "big")], [0, 1, 2])
server.sendall(said)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
status = int.from_bytes(server.recv(2), "big", signed=True)
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
"""Stands for a Python: says what it was asked to do, passes signals on, ends as what was done."""


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


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[Path]:
    """An executable for `sys.executable`: `-m MODULE`, `-c CODE` or a file, with libraries loaded.

    What it runs is forked from the server of this module, has the arguments, environment, working
    folder and streams of who called it, and gets its signals.
    """
    address = str(folder / "warm")
    client = folder / "python"
    client.write_text(_CLIENT.format(python=sys.executable, address=address))
    client.chmod(client.stat().st_mode | stat.S_IEXEC)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    process: Any = _context.Process(target=_serve, args=(listener,))
    process.start()
    try:
        yield client
    finally:
        process.kill()
        process.join()
        listener.close()


def _serve(listener: socket.socket) -> None:
    end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that are done
    while True:
        caller, _ = listener.accept()
        if os.fork() == 0:
            _attend(caller)
            return
        caller.close()


def _attend(caller: socket.socket) -> None:
    """Do what one caller asks in a process of its own, and tell the caller how that ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(caller, 8, 3)
    with caller.makefile("rb") as file:
        words, place, env = json.loads(file.read(int.from_bytes(head, "big")))
    parent = os.getpid()
    worker = os.fork()
    if worker == 0:
        caller.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(place)
        _python(words, {**env, **({PARENT: str(parent)} if PARENT in env else {})})
        return
    while not (done := os.waitpid(worker, os.WNOHANG))[0]:
        if select.select([caller], [], [], 0.02)[0]:
            for number in caller.recv(1) or bytes([signal.SIGKILL]):  # it is gone
                os.kill(worker, number)
    with contextlib.suppress(OSError):
        caller.sendall(os.waitstatus_to_exitcode(done[1]).to_bytes(2, "big", signed=True))
    os._exit(0)


def _python(words: list[str], env: dict[str, str]) -> None:
    """Be the Python that was started with these words, and so are those that it starts."""
    _take(env)
    sys.stdin = os.fdopen(0, closefd=False)  # which multiprocessing has closed
    sys.executable, *sys.argv = (word for word in words if word != "-u")
    if (how := sys.argv[0]) == "-m":
        del sys.argv[0]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        exec(compile(sys.argv.pop(1), "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(how).parent))
        runpy.run_path(how, run_name="__main__")


def _take(env: dict[str, str]) -> None:
    """Have an environment, and what libraries would have read of it as they were imported."""
    os.environ.clear()
    os.environ.update(env)
    import torch

    gc.freeze()  # as tests/conftest.py does
    torch.set_num_threads(1)  # told too late by the environment: torch is there already
    # Workers as the command has them: those of another server would outlive a killed run.
    multiprocessing.set_start_method("fork", force=True)


def _run(
    arguments: tuple[str, ...],
    log: Path,
    env: dict[str, str],
    moment: Callable[[], bool] | None,
) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from diffalign import cli

    _take(env)
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
