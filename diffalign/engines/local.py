"""Processes of this machine, started by PyTorch's own launcher; one is this process itself.

A worker that dies has its group started again, up to three times: every worker then goes on with
the blocks of its share that are missing. There is no process group; ranks come by the environment.
Workers are commands of their own: the launcher waits for ever where a function that it called in a
process is killed as it returns (torch 2.15).
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.blocks import AbstractPlan, Block, Worker, here, share
from diffalign.console import silence_libraries
from diffalign.engines.base import AbstractEngine, MakePlan, watched
from diffalign.errors import ConfigError, DiffalignError
from diffalign.processes import PARENT, end_with_launcher

RESTARTS = 3
"""How often the workers are started again after one of them died."""
_TASK, _ERROR = "task", "error"
"""Files of a launch: what workers do, and why one could not go on."""
_STOPPED = "stopped"
"""A file next to the blocks: a worker cannot go on, and the others need not."""


@dataclass(frozen=True, kw_only=True)
class Local(AbstractEngine):
    """Processes of this machine."""

    @property
    def is_here(self) -> bool:
        return self.processes == 1

    def check(self, device: str) -> None:
        if self.is_here:
            return
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"--processes {self.processes}: device is {device}, which is one, and every "
                f"process takes one of its own; leave device out"
            )
        import torch

        gpus = torch.cuda.device_count()
        if device != "cpu" and 0 < gpus < self.processes:
            raise ConfigError(
                f"--processes {self.processes}: this machine has {gpus} GPUs, one process each"
            )

    def run(
        self,
        plan: AbstractPlan,
        make: MakePlan,
        blocks: Sequence[Block],
        on_done: Callable[[int], None],
    ) -> None:
        if self.is_here or len(blocks) == 1:
            here(on_done)(plan, blocks)
            return
        stopped = plan.store / _STOPPED
        stopped.unlink(missing_ok=True)
        names = [block.name for block in blocks]
        with watched(plan, blocks, on_done):
            errors = _launch(make, names, processes=min(self.processes, len(blocks)))
        stopped.unlink(missing_ok=True)
        if errors:
            raise errors[0]


def _launch(make: MakePlan, names: Sequence[str], *, processes: int) -> list[DiffalignError]:
    """Have workers do blocks; gives why some of them could not go on."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    threads = max(1, (os.cpu_count() or 1) // processes)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / _TASK).write_bytes(pickle.dumps((make, list(names), threads)))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            run_id=f"diffalign-{os.getpid()}",
            max_restarts=RESTARTS,
            logs_specs=DefaultLogsSpecs(log_dir=temporary),
        )
        try:
            os.environ[PARENT] = str(os.getpid())
            elastic_launch(config, sys.executable)("-m", __name__, temporary)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from error
            raise SystemExit(128 + error.sigval) from error
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise DiffalignError(
                f"a worker (rank {rank}) died {RESTARTS + 1} times, the last time with exit code "
                f"{failure.exitcode}: {_reason(failure.exitcode)}. What is done stays; the same "
                f"command goes on from there"
            ) from error
        finally:
            os.environ.pop(PARENT, None)
        return [pickle.loads(path.read_bytes()) for path in sorted(folder.glob(f"{_ERROR}-*"))]


def _reason(exitcode: int) -> str:
    if exitcode == -signal.SIGKILL:
        return (
            "it was killed, as the system does where memory runs out; take fewer --processes or a "
            "smaller batch_size"
        )
    return "what it printed above says why"


def _work(folder: Path) -> None:
    """One worker's share; why it could not go on is left in the folder of its task."""
    end_with_launcher()
    import torch

    make, names, threads = pickle.loads((folder / _TASK).read_bytes())
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    silence_libraries()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    stopped: Path | None = None
    try:
        plan = make()
        stopped = plan.store / _STOPPED
        on_gpu = plan.device != "cpu" and torch.cuda.device_count() > 0
        own = share(names, number=rank, of=size)
        worker = Worker(plan, f"cuda:{rank}" if on_gpu else None, upcoming=own)
        for name in own:
            if stopped.exists():
                return
            worker.do(name)
    except DiffalignError as error:
        if stopped is not None:
            stopped.touch()
        (folder / f"{_ERROR}-{rank}").write_bytes(pickle.dumps(error))


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
