"""Actors of a Ray cluster, each with a model of its own; Ray restarts those that die.

Without an address a cluster of this machine alone starts, and ends with the job. All machines of a
cluster need diffalign, and the folders of the job under the same names.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.blocks import AbstractPlan, Block, Worker
from diffalign.console import silence_libraries
from diffalign.engines.base import AbstractEngine, MakePlan
from diffalign.errors import ConfigError, DiffalignError

RETRIES = 3
"""How often an actor is started again, and how often a block is tried again after one died."""
_SECONDS_TO_CONNECT = 10.0


@dataclass(frozen=True, kw_only=True)
class Ray(AbstractEngine):
    """Actors of a Ray cluster."""

    address: str | None = None
    """HOST:PORT of a cluster to join; None is that of RAY_ADDRESS, or else a cluster of this
    machine alone."""

    def check(self, device: str) -> None:
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"--engine ray needs Ray, which cannot be imported ({error}): install it with "
                f"pip install 'diffalign[ray]', or leave --engine out"
            ) from error
        if (address := self._address()) is not None:
            _check_reachable(address)

    def run(
        self,
        plan: AbstractPlan,
        make: MakePlan,
        blocks: Sequence[Block],
        on_done: Callable[[int], None],
    ) -> None:
        import ray

        with self._cluster():
            gpu = plan.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
            kind = "GPU" if gpu else "CPU"
            there = int(ray.cluster_resources().get(kind, 0))
            if there < self.processes:
                raise ConfigError(
                    f"--processes {self.processes}: the Ray cluster has {there} {kind}s, and each "
                    f"process takes one"
                )
            options: dict[str, Any] = {"num_gpus": 1} if gpu else {"num_cpus": 1}
            actor = ray.remote(max_restarts=RETRIES, max_task_retries=RETRIES, **options)(_Actor)
            count = min(self.processes, len(blocks))
            actors: list[Any] = [actor.remote(make, str(Path.cwd())) for _ in range(count)]
            try:
                _do_all(actors, blocks, on_done)
            finally:
                for each in actors:
                    ray.kill(each)

    def _address(self) -> str | None:
        return self.address or os.environ.get("RAY_ADDRESS") or None

    @contextmanager
    def _cluster(self) -> Iterator[None]:
        """A connection; one that is there already is used, and stays."""
        import ray

        if ray.is_initialized():
            yield
            return
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if (address := self._address()) is not None:
                ray.init(address=address, **quiet)
            else:
                ray.init(
                    num_cpus=max(self.processes, os.cpu_count() or 1),
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",  # elsewhere it may wait for the network for ever
                    **quiet,
                )
        except (ConnectionError, RuntimeError, OSError, ValueError) as error:
            raise ConfigError(
                f"--engine ray: no cluster at {self._address() or 'this machine'}: {error}"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise ConfigError where nobody listens at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # a word of Ray's, such as auto
    try:
        with socket.create_connection((host, int(port)), timeout=_SECONDS_TO_CONNECT):
            return
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"--engine ray: nobody listens at {address} ({error}). Start a cluster there (ray "
            f"start --head), correct --address or RAY_ADDRESS, or leave both out for a cluster of "
            f"this machine alone"
        ) from error


class _Actor:
    """A worker on whichever machine."""

    def __init__(self, make: MakePlan, folder: str) -> None:
        self._make, self._folder = make, folder
        self._worker: Worker | None = None

    def do(self, name: str) -> int | DiffalignError:
        """Do a block; gives its size, or why this worker cannot go on."""
        try:
            if self._worker is None:
                self._worker = self._opened()
            return self._worker.do(name)
        except DiffalignError as error:
            return error

    def _opened(self) -> Worker:
        try:
            os.chdir(self._folder)
        except OSError as error:
            raise ConfigError(
                f"--engine ray: {socket.gethostname()} has no folder {self._folder}: all machines "
                f"of the cluster need the folders of the job under the same names ({error})"
            ) from error
        silence_libraries()
        return Worker(self._make())


def _do_all(actors: Sequence[Any], blocks: Sequence[Block], on_done: Callable[[int], None]) -> None:
    """Give every actor one block after the other."""
    import ray

    waiting = iter(blocks)
    working: dict[Any, Any] = {}

    def give(actor: Any) -> None:
        if (block := next(waiting, None)) is not None:
            working[actor.do.remote(block.name)] = actor

    for actor in actors:
        give(actor)
    while working:
        (done, *_), _ = ray.wait([*working], num_returns=1)
        actor = working.pop(done)
        try:
            result = ray.get(done)
        except ray.exceptions.RayError as error:
            raise DiffalignError(
                f"--engine ray: a worker died {RETRIES + 1} times: {error}. What is done stays; "
                f"the same command goes on from there"
            ) from error
        if isinstance(result, DiffalignError):
            raise result
        on_done(result)
        give(actor)
