"""Processes of one machine: one at a time writes in a folder, and none outlives its parent.

The lock is the operating system's: it goes with the process that holds it, however that ends, so
that a run killed at any moment leaves nothing behind that a resume would have to clear away.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from diffalign.errors import BusyError, DataError
from diffalign.parsing import parse_json

PARENT = "DIFFALIGN_PARENT"
"""Environment variable: the process that this one was started by and ends with."""

SIGNALS = tuple(s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGUSR1"))
"""Those that ask a run to stop. SIGUSR1 is what SLURM sends before a job's time is up, where the
job asks for it: scripts/slurm/train.sbatch."""

_PATIENCE = 15.0
"""Seconds to wait for the children of a holder that is dead itself: they end with their parent."""
_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2): the signal to get when the parent dies."""
_POLL = 0.2


@contextmanager
def only_writer(folder: Path, *, of: str = "", patience: float = 0.0) -> Iterator[None]:
    """Hold `folder` for this process alone while the context lasts.

    The folder is created, and is gone again where nothing was written in it.
    Where the file system knows no locks nothing is held, and standard error says so.

    Args:
        folder: where it is about to write.
        of: name of what is written there, where several things may be written at once; different
            names do not block each other.
        patience: seconds to wait for another process that holds it.

    Raises:
        BusyError: another process holds it; the message names that process.
        DataError: the folder cannot be written.
    """
    prefix = f".{of}" if of else ""
    path, holder = folder / f"{prefix}.lock", folder / f"{prefix}.holder.json"
    with contextlib.ExitStack() as stack:
        try:
            made = [part for part in (folder, *folder.parents) if not part.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            if _file_system_locks(path):
                stack.enter_context(_acquired(path, holder, folder / of, patience))
            else:
                print(
                    f"{folder}: this file system has no locks, so nothing keeps a second process "
                    f"from writing there: take care that none does",
                    file=sys.stderr,
                )
            stack.callback(_forget, holder, path, made)
            _write_through(holder, json.dumps(_this_process()))
        except OSError as error:
            raise DataError(
                f"{folder}: cannot be written ({error.strerror or error}), and so nothing was "
                f"started. Make room there or ask for the right to write, or choose another folder"
            ) from error
        yield


def writer_of(folder: Path) -> dict[str, Any] | None:
    """The note of the process that writes in a folder now: `pid`, `host`, `since`, `command`.

    None where there is none, or where it ended without taking its note away. Nothing is locked: a
    process of another machine counts as one that goes on.
    """
    found = _read_holder(folder / ".holder.json")
    return None if not found or _is_dead(found) else found


def _acquired(
    path: Path, holder: Path, wanted: Path, patience: float
) -> contextlib.AbstractContextManager[Any]:
    lock = FileLock(path)
    began = time.monotonic()
    while True:
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            found = _read_holder(holder)
            waited = time.monotonic() - began
            if waited > (max(patience, _PATIENCE) if _is_dead(found) else patience):
                raise BusyError(_refusal(wanted, wanted != path.parent, found)) from None
        time.sleep(_POLL)


def _file_system_locks(path: Path) -> bool:
    """Whether the folder of a file has the locks of the operating system; creates the file."""
    try:
        import fcntl
    except ImportError:
        return True  # Windows: always
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # held: it has
    finally:
        os.close(descriptor)
    return True


def _this_process() -> dict[str, Any]:
    # Arguments with a value may hold a key: they stay out of every file.
    arguments = [argument for argument in sys.argv[1:] if "=" not in argument]
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(
            [Path(sys.argv[0]).name.replace("__main__.py", "diffalign"), *arguments]
        ),
    }


def _read_holder(path: Path) -> dict[str, Any]:
    """The holder's note on itself; empty where it has written none yet."""
    try:
        found = parse_json(path.read_bytes(), path)
    except (OSError, DataError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_dead(found: dict[str, Any]) -> bool:
    """Whether a holder was a process of this machine that is no more."""
    pid = found.get("pid")
    if found.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _refusal(wanted: Path, is_file: bool, found: dict[str, Any]) -> str:
    who = "another process"
    if found:
        who = (
            f"{found.get('command')} (process {found.get('pid')} on {found.get('host')}, since "
            f"{found.get('since')})"
        )
    left = " has ended, and a process that it started still" if _is_dead(found) else ""
    other = "give this one another name" if is_file else "choose another folder with output=..."
    return (
        f"{wanted} is in use: {who}{left} writes there, and two at once would destroy each other's "
        f"files. Wait until it ends or stop it, or {other}"
    )


def _forget(holder: Path, lock: Path, made: list[Path]) -> None:
    """Remove what is said of the holder, and new folders if there is nothing in them."""
    with contextlib.suppress(OSError):
        holder.unlink(missing_ok=True)
        if made and [path.name for path in made[0].iterdir()] == [lock.name]:
            lock.unlink()
            for folder in made:
                folder.rmdir()


def _write_through(path: Path, text: str) -> None:
    """Write a small file and wait for the disk: it says whether the disk takes anything at all."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def end_with_parent(parent: int | None = None) -> None:
    """Have this process killed when the one that started it is gone, however that ended.

    Linux does it by itself; elsewhere a thread looks every half second.

    Args:
        parent: its process id, if known, in case it is gone already; None takes the present one.
    """
    if parent is None:
        parent = os.getppid()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        _end()
    if sys.platform != "linux":
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int, *, every: float = 0.5) -> None:
    while os.getppid() == parent:
        time.sleep(every)
    _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


def end_with_launcher() -> None:
    """`end_with_parent` where the environment names one; what this process starts has none."""
    if (parent := os.environ.pop(PARENT, "")).isdigit():
        end_with_parent(int(parent))
