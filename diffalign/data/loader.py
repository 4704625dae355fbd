"""Batches as a plan asks for them: workers, replacement of what is unusable, a place to resume."""

from __future__ import annotations

import functools
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from torch.utils.data import DataLoader

from diffalign.data.layout import Layout
from diffalign.data.plans import AbstractPlan, PlannedBatch, Work
from diffalign.data.skipping import SkipLog, Skipped
from diffalign.errors import DataError
from diffalign.processes import SIGNALS, end_with_parent
from diffalign.seeding import cpu_generator, derive_seed

_ATTEMPTS = 100
"""Replacements tried in turn for one unusable pair; at most a share of `max_bad_fraction` fail."""

S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)
B = TypeVar("B")


class Decoder(Protocol[S_co]):
    """What a worker does: a map-style data set, indexed by `Work` in place of a number."""

    def __getitem__(self, work: Work, /) -> S_co | Skipped:
        """The sample of one visit of a pair, or why the pair cannot be used."""


class PlannedBatches(Generic[S, B]):
    """The endless batches of a plan on this rank, decoded by workers.

    The position is that behind the batches handed out: what workers hold ready does not count.
    """

    def __init__(
        self,
        plan: AbstractPlan,
        decoder: Decoder[S],
        stack: Callable[[Sequence[S]], B | tuple[B, ...]],
        skips: SkipLog,
        *,
        layout: Layout,
        max_bad_fraction: float,
        workers: int,
        run_seed: int,
    ) -> None:
        """Args:
        plan: which pairs come next.
        decoder: makes a sample of one of them.
        stack: makes a batch of samples, or several as a tuple; no list.
        skips: where those that cannot be used are counted.
        layout: which samples are this rank's.
        max_bad_fraction: share of unusable pairs above which a DataError is raised.
        workers: processes that decode; 0 decodes in this one.
        run_seed: of the run.
        """
        self._plan = plan
        self._decoder = decoder
        self._stack = stack
        self._skips = skips
        self._layout = layout
        self._max_bad_fraction = max_bad_fraction
        self._workers = workers
        self._run_seed = run_seed
        self._position = plan.start(layout)
        if plan.known_pairs is not None:
            skips.stop_above(max_bad_fraction, out_of=plan.known_pairs)

    @property
    def known_pairs(self) -> int | None:
        """How many pairs there are, the unusable ones included; None where nobody knows."""
        return self._plan.known_pairs

    def stop_above(self, share: float) -> None:
        """Raise DataError where more than this share of the known pairs is unusable already."""
        if self._plan.known_pairs is not None:
            self._skips.stop_above(share, out_of=self._plan.known_pairs)

    def describe(self) -> list[str]:
        """Lines for the start of a run: counts, and what is unusable already."""
        return [self._plan.describe(), *self._describe_skipped()]

    def describe_end(self) -> list[str]:
        """Lines for the end of a run; none if every row was used."""
        left_out = ", ".join(f"{n:,} {reason}" for reason, n in self.left_out_counts.items())
        lines = [f"rows left out, without a preference: {left_out}"] if left_out else []
        return [*lines, *self._describe_skipped()]

    def _describe_skipped(self) -> list[str]:
        skipped = ", ".join(f"{n:,} {reason}" for reason, n in self._skips.counts.items())
        listed = f", listed in {self._skips.path}" if self._skips.path else ""
        return [f"pairs skipped as unusable: {skipped}{listed}"] if skipped else []

    @property
    def left_out_counts(self) -> dict[str, int]:
        """Rows without a preference, by reason; of a stream, those read so far."""
        return self._plan.left_out(self._position)

    @property
    def skipped_counts(self) -> dict[str, int]:
        """Unusable pairs met so far by reason, over all ranks."""
        return self._skips.counts

    def state_dict(self) -> dict[str, Any]:
        """The position, of plain JSON values, the same on every rank; all of them must call."""
        self._position = self._plan.of_all_ranks(self._position)
        return {"pairs_per_micro_batch": self._layout.micro_batch, **self._position}

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Within this context batches are looked at; afterwards the position is that of before."""
        position = self._position
        try:
            yield
        finally:
            self._position = position

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position; iterate anew afterwards.

        Raises:
            DataError: it belongs to another data set or to other global micro-batches.
        """
        position = dict(state)
        size = position.pop("pairs_per_micro_batch")
        self._layout.check_micro_batch(size)
        if "micro_batches" in position:  # of an older checkpoint
            position["samples"] = position.pop("micro_batches") * size
        self._plan.check(position)
        self._position = position

    def __iter__(self) -> Iterator[B]:
        in_flight: deque[PlannedBatch] = deque()

        def works() -> Iterator[list[Work]]:
            for planned in self._plan.batches(self._position, self._layout):
                in_flight.append(planned)
                yield planned.works

        for batch in self._loader(works()):
            planned = in_flight.popleft()
            self._skip(planned.skipped, planned)
            if isinstance(batch, list):
                batch = self._stack([self._usable(r, i, planned) for i, r in enumerate(batch)])
            self._position = planned.after
            yield from _each(batch)

    def most_visits(self, micro_batches: int) -> int | None:
        """See `AbstractSource.most_visits`."""
        return self._plan.most_visits(micro_batches, self._layout.micro_batch)

    def sweep(self, works: Sequence[Work]) -> Iterator[B]:
        """Batches of these visits in order, size by size of their images; the position stays, and
        nothing is replaced.

        What cannot be used is counted and left out, so that batches may be smaller.
        """
        by_target: dict[Any, list[Work]] = {}
        for work in works:
            by_target.setdefault(work.target, []).append(work)
        size = self._layout.samples_per_device
        return self.in_parts(
            [
                alike[start : start + size]
                for alike in by_target.values()
                for start in range(0, len(alike), size)
            ]
        )

    def in_parts(self, parts: Sequence[Sequence[Work]]) -> Iterator[B]:
        """`sweep` of visits that are cut into batches already."""
        for batch in self._loader(list(part) for part in parts):
            if not isinstance(batch, list):
                yield from _each(batch)
                continue
            skipped = [result for result in batch if isinstance(result, Skipped)]
            for pair in skipped:
                self._skips.add(pair)
            if self._plan.known_pairs is not None:
                self._skips.stop_above(self._max_bad_fraction, out_of=self._plan.known_pairs)
            usable = [result for result in batch if not isinstance(result, Skipped)]
            if usable:
                yield from _each(self._stack(usable))

    def _loader(self, works: Iterator[list[Work]]) -> DataLoader:
        return DataLoader(
            self._decoder,  # type: ignore[arg-type]  # all that it asks of a data set is indexing
            batch_sampler=works,
            collate_fn=functools.partial(_stack_if_usable, self._stack),
            num_workers=self._workers,
            worker_init_fn=ignore_interrupts,
            # one that prepares whole steps holds as many as there are workers, not twice as many
            prefetch_factor=1 if self._workers and self._layout.tokens_per_device else None,
            # Its own generator: the loader samples from it, and must not shift the run's RNG.
            generator=cpu_generator(derive_seed(self._run_seed, "loader")),
        )

    def _usable(self, result: S | Skipped, place: int, planned: PlannedBatch) -> S:
        """The sample, or that of the first replacement that can be used."""
        for attempt in range(_ATTEMPTS):
            if not isinstance(result, Skipped):
                return result
            self._skip([result], planned)
            result = self._decoder[planned.replacement(place, attempt)]
        raise DataError(f"{_ATTEMPTS} pairs in a row could not be used, the last one {result}")

    def _skip(self, skipped: Sequence[Skipped], planned: PlannedBatch) -> None:
        for pair in skipped:
            self._skips.add(pair)
        self._skips.stop_above(self._max_bad_fraction, out_of=planned.out_of)


@contextmanager
def told_of_lost_workers(section: str) -> Iterator[None]:
    """Within this context the sudden end of a worker is a sentence.

    torch reports it wherever the process is at that moment, so this goes around all that is
    done while workers are at work.

    Args:
        section: of the config that has their number.

    Raises:
        DataError: a worker ended.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip()
        if not text.startswith("DataLoader worker"):
            raise
        cause = (
            "shared memory ran out: enlarge it (in a container, --shm-size), or lower"
            if "Bus error" in text or "shared memory" in text
            else "as a rule the system kills one where memory runs out: lower"
        )
        raise DataError(
            f"a process that prepares batches ended ({text}); {cause} {section}.workers (0 "
            f"prepares them in the main process) or training.samples_per_device. What was saved "
            f"can be resumed with --resume"
        ) from error


def _each(made: B | tuple[B, ...]) -> tuple[B, ...]:
    return made if isinstance(made, tuple) else (made,)


def _stack_if_usable(
    stack: Callable[[Sequence[S]], B | tuple[B, ...]], results: list[S | Skipped]
) -> B | tuple[B, ...] | list[S | Skipped]:
    """In the worker: the batch, unless the training process has to replace some of it."""
    samples = [result for result in results if not isinstance(result, Skipped)]
    return stack(samples) if len(samples) == len(results) else results


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C, SIGTERM and SIGUSR1 reach the whole process group; the trainer alone decides, and it
    needs its workers until the step is finished. They end with their parent, however that ends: a
    killed run must not go on holding its folder through them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
