"""A command's part in a plan: what it does, what it waits for, and whether it merges.

A folder is held by one command for itself, or by shards: commands that count themselves (1/3, 2/3,
3/3) and do their share each. The shard that ends last merges.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.blocks import AbstractPlan, Block, Engine, Plan, read_block, share
from diffalign.errors import BusyError, ConfigError, DataError
from diffalign.files import read_json, write_json
from diffalign.parsing import checked
from diffalign.processes import only_writer

_PLAN = "plan.json"
_PATIENCE = 600.0
"""Seconds to wait for another shard that reads the plan or merges."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of several commands that share a plan without knowing of each other."""

    number: int
    """From 1."""
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `I/N`.

        Raises:
            ConfigError: it is something else, or I is not from 1 to N.
        """
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count:
            raise ConfigError(
                f"--shard {text}: write it as I/N, this command's number and how many there are, I "
                f"from 1 to N: with --shard 1/4, 2/4, 3/4 and 4/4 four commands share the work"
            )
        return cls(number=number, count=count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True, kw_only=True)
class _PlanFile:
    """The file of a plan: whose blocks a folder holds."""

    digest: str
    shards: int | None


@dataclass
class Missing:
    """What others still have to do."""

    blocks: int
    of_shards: list[int]


class Session:
    """One command's part in a plan."""

    def __init__(
        self, folder: Path | None = None, *, of: str = "", shard: Shard | None = None
    ) -> None:
        """Use `held`, or `complete`.

        Args:
            folder: to hold; None takes no locks, for one who has them.
            of: name of what is written there.
            shard: which one this is.
        """
        self.shard = shard
        self.failed: list[Mapping[str, Any]] = []
        """After `run`: all items of the plan that failed."""
        self.pending: list[Block] = []
        """After `begin`: what this command does."""
        self._place = None if folder is None else (folder, of)
        self._make: Callable[[], AbstractPlan] | None = None
        self._own = ExitStack()
        self._exclusive = ExitStack()
        self._all_was_done = False
        if folder is not None and shard is None:
            self._own.enter_context(only_writer(folder, of=of))
            with self._own:
                _hold_shards(self._own, folder, of)
                self._own = self._own.pop_all()
        elif folder is not None and shard is not None:
            try:
                self._own.enter_context(only_writer(folder, of=_shard_name(of, shard)))
            except BusyError as error:
                raise BusyError(
                    f"--shard {shard}: this shard is already at work in {folder}. {error}"
                ) from error

    def close(self) -> None:
        """Give all locks back."""
        self._exclusive.close()
        self._own.close()

    def begin(self, make: Callable[[], Plan], *, first: Callable[[], None] = lambda: None) -> Plan:
        """Make the plan, and see what is to be done.

        Args:
            make: makes it; called while no other shard reads or merges.
            first: called once it is known that the plan may be worked on, as long.

        Raises:
            BusyError: another plan is at work in this folder.
        """
        self._make = make
        with self._alone():
            plan = self._registered(make)
            own: Sequence[Block] = plan.blocks
            if self.shard is not None:
                own = share(own, number=self.shard.number - 1, of=self.shard.count)
            self._all_was_done = not self._left(plan)
            for block in own:
                if plan.file(block).exists() and not plan.is_kept(block):
                    plan.file(block).unlink()
                    self._all_was_done = False
            left = {block.name for block in self._left(plan)}
            self.pending = [block for block in own if block.name in left]
            first()
        return plan

    def run(self, plan: AbstractPlan, engine: Engine) -> Missing | None:
        """Do what is pending, and merge what is there if nothing is missing.

        Returns:
            None if the result is whole, and this command is the one to go on with it; else what is
            missing, or being made, of other shards.
        """
        if self.pending:
            engine(plan, self.pending)
        if self.shard is None:
            self._merge(plan)
            return None
        return self._merge_as_last(plan, self.shard)

    def _merge_as_last(self, plan: AbstractPlan, shard: Shard) -> Missing | None:
        if plan.is_result and not self._left(plan):
            self._forget_as_last(plan)
            return None
        self._own.close()  # so that of two that end together one is the last
        assert self._make is not None
        self._exclusive.enter_context(_plan_lock(plan.folder, plan.of))
        try:
            _hold_shards(self._exclusive, plan.folder, plan.of)
        except BusyError:  # which goes on from here
            self._exclusive.close()
            return self._missing(plan, shard)
        if _read_plan(plan.store) is None and not self._all_was_done:
            plan = self._make()
            if not self._left(plan):
                self._exclusive.close()
                return Missing(0, [])
        if self._left(plan):
            self._exclusive.close()
            return self._missing(plan, shard)
        self._merge(plan)
        return None

    def _forget_as_last(self, plan: AbstractPlan) -> None:
        self._own.close()
        with suppress(BusyError), ExitStack() as stack:
            stack.enter_context(_plan_lock(plan.folder, plan.of))
            _hold_shards(stack, plan.folder, plan.of)
            _forget(plan.store)

    def _missing(self, plan: AbstractPlan, shard: Shard) -> Missing:
        left = {block.name for block in self._left(plan)}
        places = [place for place, block in enumerate(plan.blocks) if block.name in left]
        return Missing(len(left), sorted({place % shard.count + 1 for place in places}))

    def _merge(self, plan: AbstractPlan) -> None:
        rows: list[Mapping[str, Any]] = []
        for block in plan.blocks:
            if not plan.is_result and plan.file(block).exists():
                made, failed = read_block(plan.file(block))
                rows += made
                self.failed += failed
        if rows:
            plan.merge(rows)
        _forget(plan.store)

    def _left(self, plan: AbstractPlan) -> list[Block]:
        return [b for b in plan.blocks if not plan.is_done(b) and not plan.file(b).exists()]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Among shards of one plan, that no other one reads or merges meanwhile."""
        if self.shard is None or self._place is None:
            yield
            return
        folder, of = self._place
        with ExitStack() as stack:
            stack.enter_context(_plan_lock(folder, of))
            with only_writer(folder, of=of):
                pass  # a command for itself would hold it
            _hold(stack, folder, _others(folder, of, self.shard))  # one at work would hold it
            yield

    def _registered(self, make: Callable[[], Plan]) -> Plan:
        plan = make()
        found = _read_plan(plan.store)
        if found is not None and found.digest != plan.digest():
            if self.shard is not None:
                raise BusyError(
                    f"{plan.store}: holds blocks of another plan than this command's, of other "
                    f"settings, prompts, questions or files, and shards share one plan. Give all "
                    f"shards the settings of the first, or choose another folder; the same command "
                    f"without --shard goes on from what is there"
                )
            _salvage(plan)
            plan = make()
            found = None
        count = None if self.shard is None else self.shard.count
        if not self._left(plan) and found is None:
            return plan
        if found is None or found.shards != count:
            write_json(plan.store / _PLAN, vars(_PlanFile(digest=plan.digest(), shards=count)))
        return plan


@contextmanager
def held(folder: Path, *, of: str = "", shard: Shard | None = None) -> Iterator[Session]:
    """Hold a folder, or a shard of it, while the context lasts.

    Args:
        folder: of the results; created.
        of: name of what is written there, where several things may be.
        shard: which one this command is; None holds the folder for this command alone.

    Raises:
        BusyError: another command, or this shard, is at work there.
        DataError: the folder cannot be written.
    """
    session = Session(folder, of=of, shard=shard)
    try:
        yield session
    finally:
        session.close()


def complete(make: Callable[[], AbstractPlan], engine: Engine) -> Session:
    """Do and merge a whole plan, without locks: for one who has them."""
    session = Session()
    session.run(session.begin(make), engine)
    return session


def _shard_name(of: str, shard: Shard) -> str:
    return f"{of}.shard-{shard.number}-of-{shard.count}".lstrip(".")


def _plan_lock(folder: Path, of: str) -> Any:
    return only_writer(folder, of=f"{of}.plan".lstrip("."), patience=_PATIENCE)


_LOCK = re.compile(r"\.(?P<name>.*?shard-[0-9]+-of-(?P<count>[0-9]+))\.lock")


def _shard_locks(folder: Path, of: str) -> dict[str, int]:
    """Names of the locks of shards that are there, and how many shards each counts."""
    found = {}
    for path in folder.glob(f".{of}.shard-*-of-*.lock" if of else ".shard-*-of-*.lock"):
        if match := _LOCK.fullmatch(path.name):
            found[match["name"]] = int(match["count"])
    return found


def _others(folder: Path, of: str, shard: Shard) -> list[str]:
    """Shards that count differently."""
    return [name for name, count in _shard_locks(folder, of).items() if count != shard.count]


def _hold_shards(stack: ExitStack, folder: Path, of: str) -> None:
    """Hold all shards of a folder, whose locks are then gone with the context."""
    names = [*_shard_locks(folder, of)]
    _hold(stack, folder, names)
    for name in names:
        stack.callback((folder / f".{name}.lock").unlink, missing_ok=True)


def _hold(stack: ExitStack, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        stack.enter_context(only_writer(folder, of=name))


def _read_plan(store: Path) -> _PlanFile | None:
    path = store / _PLAN
    if not path.is_file():
        return None
    try:
        return checked(_PlanFile, read_json(path), path)
    except DataError:
        return _PlanFile(digest="", shards=None)


def _salvage(plan: AbstractPlan) -> None:
    """Put the rows of another plan, which nobody works on any more, into the result."""
    rows: list[Mapping[str, Any]] = []
    for path in sorted(plan.store.glob("*.jsonl")):
        with suppress(DataError):  # of a block that is damaged nothing can be kept
            rows += read_block(path)[0]
    if rows:
        plan.merge(rows)
    _forget(plan.store)


def _forget(store: Path) -> None:
    if store.is_dir():
        (store / _PLAN).unlink(missing_ok=True)
        shutil.rmtree(store, ignore_errors=True)
