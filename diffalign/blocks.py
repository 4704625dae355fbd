"""Independent work as blocks: a job's plan, cut into pieces that any number of processes share.

A plan is a function of a job's config alone. Its blocks have names made of their contents, and each
becomes one file, whole or absent: the rows that a result will have, or what failed. When no block
is missing one process merges the rows in the order of the plan into the file that users know, and
the blocks are gone. So the result is the same whoever did which block, in whichever order, and
whatever was killed meanwhile. Rows that are in the result already, of any earlier run, are done.

`sessions` has who may work on a plan, and who merges.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from diffalign import config as configs
from diffalign.errors import DataError, DiffalignError
from diffalign.files import read_json_lines, write_json_lines

T = TypeVar("T")

_FAILURES_IN_A_ROW = 16
"""So many failures without a success between them are not bad items: the run stops."""


def share(items: Sequence[T], *, number: int, of: int) -> Sequence[T]:
    """Every `of`-th of the items from place `number` on: what one of several workers does.

    Args:
        items: in an order that all workers agree on, not only those that are still to be done.
        number: of the worker, from 0.
        of: how many there are.
    """
    return items[number::of]


@dataclass(frozen=True)
class Block:
    """A piece of a plan."""

    name: str
    """Another one for other contents; a plan's blocks sort by it in their order."""
    size: int
    """How many items it has, for the progress that is shown."""
    work: Any
    """The items, as the plan knows them."""

    @classmethod
    def of(cls, position: int, content: Any, size: int, work: Any) -> Block:
        """The block at a position of a plan, named by its content (plain JSON values)."""
        return cls(f"{position:07d}-{digest(content)}", size, work)


@dataclass(frozen=True)
class Row:
    """What was made of an item, as the result will have it."""

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Failed:
    """An item of which nothing could be made; the next start of the command tries it again."""

    values: Mapping[str, Any]
    """As the plan wants to name it; `reason` says why."""


Do = Callable[[Block], Sequence["Row | Failed"]]
"""Makes the items of a block, in their order."""


class AbstractPlan(abc.ABC):
    """The work of a job, in blocks."""

    title: str
    """Names what advances, for people."""
    unit: str = "images"
    """The items."""
    folder: Path
    """Where the results go."""
    of: str = ""
    """Name of what is written there, where several things may be."""
    device: str = "auto"
    """The device of the settings."""
    blocks: Sequence[Block]
    """All of them in order, whether done or not."""
    is_result: bool = False
    """Whether the files of the blocks are the result, and nothing is merged."""
    failures_in_a_row: int | None = _FAILURES_IN_A_ROW
    """So many end the run; None never."""

    @abc.abstractmethod
    def is_done(self, block: Block) -> bool:
        """Whether the result had all rows of a block when the plan was made."""

    @abc.abstractmethod
    def open(self, device: str | None, upcoming: Sequence[Block]) -> Do:
        """Get ready to do blocks; loads what that takes, once.

        Args:
            device: that of a worker among several; None is that of the settings.
            upcoming: what will be asked for, in this order, as far as it is known.
        """

    @abc.abstractmethod
    def merge(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put rows into the result, whole or not at all; those that are there already stay."""

    def in_words(self, failed: Mapping[str, Any]) -> str:
        """An item that failed, for people."""
        return str(failed["reason"])

    # What follows is the same for all plans whose blocks hold rows.

    @property
    def store(self) -> Path:
        """The folder of the blocks."""
        return self.folder / (f".{self.of}.blocks" if self.of else ".blocks")

    def file(self, block: Block) -> Path:
        """What a block becomes."""
        return self.store / f"{block.name}.jsonl"

    def write(self, block: Block, made: Sequence[Row | Failed]) -> None:
        """Write the file of a block, whole or not at all."""
        lines = [{"row" if isinstance(m, Row) else "failed": dict(m.values)} for m in made]
        write_json_lines(self.file(block), [*lines, {"digest": digest(lines)}])

    def is_kept(self, block: Block) -> bool:
        """Whether the file of a block from an earlier run counts: not where items failed."""
        try:
            return not read_block(self.file(block))[1]
        except DataError:
            return False

    def digest(self) -> str:
        """Tells a plan from others."""
        return digest([block.name for block in self.blocks])


Plan = TypeVar("Plan", bound=AbstractPlan)


def read_block(path: Path) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Rows of a block's file, and what failed.

    Raises:
        DataError: it is damaged.
    """
    *lines, last = read_json_lines(path) or [None]
    if not isinstance(last, Mapping) or last.get("digest") != digest(lines):
        raise DataError(f"{path}: is damaged; delete it, and the same command makes it again")
    rows = [line["row"] for line in lines if "row" in line]
    return rows, [line["failed"] for line in lines if "failed" in line]


@dataclass(frozen=True)
class Recipe(Generic[Plan]):
    """How a plan is made. It travels to other processes as plain settings."""

    function: Callable[..., Plan]
    """Of a module's level; takes the config, and what `further` has."""
    config: Any
    """The frozen dataclass of a job."""
    further: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments by name, which can be pickled."""

    def __call__(self) -> Plan:
        """Make the plan."""
        return self.function(self.config, **self.further)

    def __reduce__(self) -> tuple[Any, ...]:
        settings = configs.to_dict(self.config)
        return _recipe, (self.function, type(self.config), settings, dict(self.further))


def _recipe(
    function: Callable[..., Plan],
    cls: type[Any],
    settings: dict[str, Any],
    further: dict[str, Any],
) -> Recipe[Plan]:
    if configs.is_component(cls):
        settings.pop("kind")
    return Recipe(function, configs.from_dict(cls, settings), further)


def digest(content: Any) -> str:
    """Short, of plain JSON values."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


class Worker:
    """Does blocks of a plan, one after the other."""

    def __init__(
        self, plan: AbstractPlan, device: str | None = None, *, upcoming: Sequence[str] = ()
    ) -> None:
        """Args:
        plan: whose blocks.
        device: see `AbstractPlan.open`.
        upcoming: names of the blocks that it will be asked for, as far as they are known.
        """
        self._plan, self._device, self._upcoming = plan, device, upcoming
        self._blocks = {block.name: block for block in plan.blocks}
        self._do: Do | None = None
        self._in_a_row = 0

    def do(self, name: str) -> int:
        """Do a block whose file is absent; gives its size.

        Raises:
            DiffalignError: nothing can be made any more; the block is done or was not started.
        """
        block = self._blocks[name]
        if self._plan.file(block).exists():
            return block.size
        if self._do is None:
            upcoming = [self._blocks[name] for name in self._upcoming]
            left = [each for each in upcoming if not self._plan.file(each).exists()]
            self._do = self._plan.open(self._device, left)
        made = self._do(block)
        self._plan.write(block, made)
        for each in made:
            self._in_a_row = self._in_a_row + 1 if isinstance(each, Failed) else 0
        limit = self._plan.failures_in_a_row
        if limit is not None and self._in_a_row >= limit:
            reason = self._plan.in_words(made[-1].values)
            raise DiffalignError(
                f"{self._plan.title}: {self._in_a_row} {self._plan.unit} in a row failed, the last "
                f"with: {reason}. What was made is kept; fix this and run again"
            )
        return block.size


Engine = Callable[[AbstractPlan, Sequence[Block]], None]
"""Does blocks, all whose files are absent; raises DiffalignError where it cannot go on."""


def here(on_done: Callable[[int], None] = lambda size: None) -> Engine:
    """The engine that is this process."""

    def run(plan: AbstractPlan, blocks: Sequence[Block]) -> None:
        worker = Worker(plan, upcoming=[block.name for block in blocks])
        for block in blocks:
            on_done(worker.do(block.name))

    return run
