"""Several processes on this machine, for `diffalign train --processes N`; what other launchers say.

Unlike torchrun, which ends its workers when told to stop, this passes the signal on and waits:
every process finishes its step, saves, and the command exits with 0.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

import torch

from diffalign.errors import ConfigError
from diffalign.processes import PARENT, SIGNALS

RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""Environment variables in which launchers count how often they started a command again."""
_POLL_S = 0.1
_KILLED = (
    "Process {pid} of the run was killed by SIGKILL, as the system does where memory runs out; the "
    "others are ended. Lower data.workers or responses.workers, training.samples_per_device, or "
    "the number of processes, and go on with --resume"
)


def launch(arguments: list[str], *, processes: int) -> int:
    """Run `python -m diffalign ARGUMENTS` in a process group of PyTorch.

    Args:
        arguments: of the command line, without `--processes`.
        processes: how many; on a machine with GPUs, at most one per GPU.

    Raises:
        ConfigError: more processes than GPUs.

    Returns:
        0 if all processes ended well, else the first exit status that was not 0.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise ConfigError(
            f"--processes {processes}: this machine has {gpus} GPUs, one process each"
        )
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        PARENT: str(os.getpid()),  # they end with this process, even where it is killed
    }
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "diffalign", *arguments],
            env={
                "OMP_NUM_THREADS": threads,
                **os.environ,
                **group,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
        )
        for rank in range(processes)
    ]

    def pass_on(number: int, frame: FrameType | None) -> None:
        # As SIGTERM: on Ctrl-C the children have had the terminal's own SIGINT, and a second one
        # would mean "at once".
        for child in children:
            child.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        return _wait(children)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; when one fails the others, who would wait for it for ever, are ended."""
    waiting = set(children)
    status = 0
    while waiting:
        for child in [child for child in waiting if child.poll() is not None]:
            waiting.discard(child)
            code = child.returncode
            if code and not status:
                status = code if code > 0 else 128 - code
                if code == -signal.SIGKILL:
                    print(_KILLED.format(pid=child.pid), file=sys.stderr)
                for other in waiting:
                    other.kill()
        time.sleep(_POLL_S)
    return status


def check_restarts() -> None:
    """Raise ConfigError where torchrun could not start the ranks again as it is asked to.

    With the c10d rendezvous the ranks of the second attempt would find the addresses of the first
    in the store that they share with torchrun (pytorch issue 135712), and end.
    """
    again = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if again.isdigit() and int(again) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(1)  # rank 0 tells it for all
        raise ConfigError(
            f"torchrun --max-restarts {again} cannot start the ranks again while they share its "
            f"store: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, and use "
            f"--rdzv-backend c10d"
        )


def restarted() -> bool:
    """Whether a launcher has started this very command again: torchrun after a fault
    (`--max-restarts`), SLURM after it put the job back into its queue."""
    return any(os.environ.get(name, "0").strip() not in ("", "0") for name in RESTARTS)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
