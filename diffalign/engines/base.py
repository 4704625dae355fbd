"""The contract of an engine, and what a job says of how its work is shared."""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

from rich.console import Console

from diffalign import components
from diffalign.blocks import AbstractPlan, Block
from diffalign.console import progress
from diffalign.errors import ConfigError
from diffalign.ranges import AtLeast, Ranged
from diffalign.sessions import Missing, Session, Shard

MakePlan = Callable[[], AbstractPlan]
"""Makes a plan; it can be sent to another process, which makes the same one."""


@dataclass(frozen=True, kw_only=True)
class AbstractEngine(Ranged, abc.ABC):
    """A way to have blocks done by several workers."""

    processes: Annotated[int, AtLeast(1)] = 1
    """How many workers; on machines with GPUs each has one for itself."""

    @property
    def is_here(self) -> bool:
        """Whether the one worker is this process."""
        return False

    @abc.abstractmethod
    def check(self, device: str) -> None:
        """Raise ConfigError for what can be known to be impossible before anything is loaded.

        Args:
            device: of the job's settings.
        """

    @abc.abstractmethod
    def run(
        self,
        plan: AbstractPlan,
        make: MakePlan,
        blocks: Sequence[Block],
        on_done: Callable[[int], None],
    ) -> None:
        """Do blocks.

        Args:
            plan: theirs.
            make: makes it again, for workers.
            blocks: those to do; their files are absent.
            on_done: told the sizes of blocks that are done.

        Raises:
            DiffalignError: a worker cannot go on; what is done stays.
        """


def engine_of(
    kind: str, processes: int, *, address: str | None = None, shard: str | None = None
) -> AbstractEngine:
    """The engine of a command line.

    Raises:
        ConfigError: there is no such engine, or it does not go with the rest.
    """
    if kind != "local" and shard is not None:
        raise ConfigError(
            f"--shard {shard} and --engine {kind}: shards are commands that you start yourself, "
            f"and {kind} shares the work by itself; give one of them"
        )
    cls = components.find(AbstractEngine, kind)  # type: ignore[type-abstract]
    if address is None:
        return cls(processes=processes)
    if kind == "local":
        raise ConfigError(
            f"--address {address}: is of a cluster, and the engine is local; add --engine ray"
        )
    return cls(processes=processes, address=address)  # type: ignore[call-arg]


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How the work of a job is shared."""

    engine: AbstractEngine = field(default_factory=lambda: engine_of("local", 1))
    """Who does it."""
    shard: Shard | None = None
    """Which part of it is this command's; None is the whole."""

    @classmethod
    def of(
        cls,
        *,
        processes: int = 1,
        engine: str = "local",
        address: str | None = None,
        shard: str | None = None,
    ) -> Sharing:
        """As a command line says it.

        Raises:
            ConfigError: what is said contradicts itself, or is not there.
        """
        part = None if shard is None else Shard.parse(shard)
        return cls(engine=engine_of(engine, processes, address=address, shard=shard), shard=part)


def do_blocks(
    session: Session, plan: AbstractPlan, make: MakePlan, sharing: Sharing, console: Console
) -> bool:
    """Have the blocks of a session done, with a bar for the whole; merged where none is missing.

    Args:
        session: that has begun with this plan.
        plan: as `session.begin` gave it.
        make: makes it again.
        sharing: how.
        console: for the bar, and for what other shards still have to do.

    Returns:
        Whether the result is whole, and the job goes on with it in this process.
    """

    def run(plan: AbstractPlan, blocks: Sequence[Block]) -> None:
        total = sum(block.size for block in blocks)
        with progress(console, plan.title, total, unit=plan.unit) as advance:
            sharing.engine.run(plan, make, blocks, advance)

    missing = session.run(plan, run)
    if missing is None:
        return True
    console.print(_in_words(sharing.shard, missing), markup=False, soft_wrap=True)
    return False


def _in_words(shard: Shard | None, missing: Missing) -> str:
    if not missing.blocks:
        return f"Shard {shard} is done; another shard ended as the last, and merges or has merged."
    whose = ", ".join(f"{number}/{shard.count}" for number in missing.of_shards) if shard else ""
    return (
        f"Shard {shard} is done; {missing.blocks} blocks of {whose} are missing. The shard that "
        f"ends last merges the results, or the same command without --shard"
    )


@contextmanager
def watched(
    plan: AbstractPlan, blocks: Sequence[Block], on_done: Callable[[int], None]
) -> Iterator[None]:
    """Tell `on_done` of blocks as their files appear, whoever writes them."""
    waiting = {plan.file(block).name: block.size for block in blocks}
    folder = plan.file(blocks[0]).parent
    over = threading.Event()

    def look() -> None:
        try:
            there = [path.name for path in folder.iterdir()]
        except FileNotFoundError:
            return
        for size in [waiting.pop(name) for name in there if name in waiting]:
            on_done(size)

    def watch() -> None:
        while not over.wait(min(0.2 + 1e-5 * len(blocks), 5.0)):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()
