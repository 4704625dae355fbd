"""Preference pairs as a source of batches: readers, plan, decoding workers and collation."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import DataLoader, Dataset

from diffalign import world
from diffalign.data.batches import ImageBatch
from diffalign.data.bucketing import assign_buckets
from diffalign.data.collate import stack, with_unit_range
from diffalign.data.columns import PAIR_VIEWS
from diffalign.data.indexed import IndexPlan, index_rows
from diffalign.data.plans import AbstractPlan, PlannedBatch, Work
from diffalign.data.preview import Preview, first_rows
from diffalign.data.reading import OpenedData, open_data
from diffalign.data.records import ImagePair, Skipped
from diffalign.data.rows import AbstractRows, AbstractRowStream
from diffalign.data.samples import Sample, SampleMaker
from diffalign.data.skipping import SkipLog
from diffalign.data.source import AbstractSource, DataConfig
from diffalign.data.streamed import StreamPlan
from diffalign.errors import DataError
from diffalign.seeding import TimestepSampling, cpu_generator, derive_seed

_ATTEMPTS = 100
"""Replacements tried in turn for one unusable pair; at most a share of `max_bad_fraction` fail."""


@dataclass(frozen=True)
class _Decoder(Dataset):
    """What a worker does; indexed by `Work`, in place of a number."""

    data: OpenedData
    maker: SampleMaker

    def __getitem__(self, work: Work) -> Sample | Skipped:
        return self.maker.make(self._pair(work.pair), work.draw, work.target)

    def _pair(self, pair: int | ImagePair) -> ImagePair:
        if isinstance(pair, ImagePair):
            return pair
        assert isinstance(self.data.rows, AbstractRows)
        found = self.data.columns.pair(self.data.rows[pair], self.data.base)
        assert isinstance(found, ImagePair), "the index holds pairs only"
        return found


class PairSource(AbstractSource):
    """Image pairs in random order, for ever."""

    batch_type: ClassVar[type] = ImageBatch

    def __init__(
        self,
        data: OpenedData,
        maker: SampleMaker,
        plan: AbstractPlan,
        skips: SkipLog,
        *,
        pairs_per_device: int,
    ) -> None:
        """Use `open`; this takes the parts."""
        self.views = frozenset(maker.views)
        self._data = data
        self._plan = plan
        self._skips = skips
        self._decoder = _Decoder(data, maker)
        self._config = maker.config
        self._run_seed = maker.run_seed
        self._pairs_per_device = pairs_per_device
        self._position = plan.start()

    @classmethod
    def open(
        cls,
        config: DataConfig,
        *,
        views: frozenset[str],
        run_seed: int,
        pairs_per_device: int,
        timesteps: TimestepSampling,
        schedule_length: int,
        skipped: Path | None,
    ) -> PairSource:
        """Find the data, choose a reader, and index labels and captions (not of a stream).

        Args:
            config: the `data:` section.
            views: what the objective asks for.
            run_seed: from which every random choice derives.
            pairs_per_device: in each micro-batch of this rank.
            timesteps: which noise levels are visited.
            schedule_length: of the model's noise schedule, in steps.
            skipped: where unusable samples are listed (`skipped.jsonl` of the run folder), shared
                by all ranks; None keeps them in memory.

        Raises:
            DataError: nothing is there, no reader understands it, it holds no preference, or it
                does not offer a view.
        """
        unknown = set(views) - set(PAIR_VIEWS)
        if unknown or not views:
            raise DataError(
                f"pairs offer the views {', '.join(PAIR_VIEWS)}, and the objective needs "
                f"{', '.join(sorted(views))}: it wants another kind of data"
            )
        data = open_data(config)
        if not views <= set(data.columns.sides):
            raise DataError(
                f"{data.summary}. Preferred images alone do for objectives such as seppo, and this "
                f"one needs {' and '.join(sorted(views))}: give data with both"
            )
        skips = SkipLog(skipped)
        maker = SampleMaker(
            config=config,
            views=tuple(view for view in PAIR_VIEWS if view in views),
            run_seed=run_seed,
            timesteps=timesteps,
            schedule_length=schedule_length,
        )
        plan = _plan(data, config, run_seed=run_seed, skips=skips)
        if plan.known_pairs is not None:
            skips.stop_above(config.max_bad_fraction, out_of=plan.known_pairs)
        return cls(data, maker, plan, skips, pairs_per_device=pairs_per_device)

    def describe(self) -> list[str]:
        return [self._data.summary, self._plan.describe(), *self._describe_skipped()]

    def describe_end(self) -> list[str]:
        left_out = ", ".join(f"{n:,} {reason}" for reason, n in self.left_out_counts.items())
        lines = [f"rows left out, without a preference: {left_out}"] if left_out else []
        return [*lines, *self._describe_skipped()]

    def _describe_skipped(self) -> list[str]:
        skipped = ", ".join(f"{n:,} {reason}" for reason, n in self.skipped_counts.items())
        listed = f", listed in {self._skips.path}" if self._skips.path else ""
        return [f"pairs skipped as unusable: {skipped}{listed}"] if skipped else []

    def fingerprint(self) -> str:
        """What is read, wherever it lies: by names and sizes of files and the number of pairs, or
        for the hub by id and revision. No image is read for it, and the same on every rank."""
        pairs = self._plan.known_pairs
        counted = "" if pairs is None else f", {pairs:,} pairs"
        return f"{self._data.fingerprint}{counted}"

    def preview(self, n: int) -> Preview:
        """What a dry run shows: the lines of `describe`, and the first `n` pairs.

        Raises:
            DataError: a label is not allowed, or no row is a pair.
        """
        return Preview(lines=self.describe(), rows=first_rows(self._data, n, self._config))

    @property
    def left_out_counts(self) -> dict[str, int]:
        """Rows without a preference, by reason; of a stream, those read so far."""
        return self._plan.left_out(self._position)

    @property
    def skipped_counts(self) -> dict[str, int]:
        return self._skips.counts

    def state_dict(self) -> dict[str, Any]:
        return {"pairs_per_micro_batch": self._global_size, **self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        position = dict(state)
        saved = position.pop("pairs_per_micro_batch")
        if saved != self._global_size:
            raise DataError(
                f"the checkpoint's place in the data counts micro-batches of {saved} pairs, and "
                f"this run has {self._pairs_per_device} per device times {world.size()} "
                f"processes = {self._global_size}. Resume with the same product"
            )
        self._plan.check(position)
        self._position = position

    @property
    def _global_size(self) -> int:
        return self._pairs_per_device * world.size()

    def __iter__(self) -> Iterator[ImageBatch]:
        in_flight: deque[PlannedBatch] = deque()

        def works() -> Iterator[list[Work]]:
            for planned in self._plan.batches(self._position, self._pairs_per_device):
                in_flight.append(planned)
                yield planned.works

        for batch in self._loader(works()):
            planned = in_flight.popleft()
            self._skip(planned.skipped, planned)
            if not isinstance(batch, ImageBatch):
                batch = stack([self._usable(r, i, planned) for i, r in enumerate(batch)])
            self._position = planned.after
            yield with_unit_range(batch)

    def _loader(self, works: Iterator[list[Work]]) -> DataLoader:
        return DataLoader(
            self._decoder,
            batch_sampler=works,
            collate_fn=_stack_if_usable,
            num_workers=self._config.workers,
            worker_init_fn=_ignore_interrupts,
            # Its own generator: the loader draws from it, and must not shift the run's RNG.
            generator=cpu_generator(derive_seed(self._run_seed, "loader")),
        )

    def _usable(self, result: Sample | Skipped, place: int, planned: PlannedBatch) -> Sample:
        """The sample, or that of the first replacement that can be used."""
        for attempt in range(_ATTEMPTS):
            if isinstance(result, Sample):
                return result
            self._skip([result], planned)
            result = self._decoder[planned.replacement(place, attempt)]
        raise DataError(f"{_ATTEMPTS} pairs in a row could not be used, the last one {result}")

    def _skip(self, skipped: Sequence[Skipped], planned: PlannedBatch) -> None:
        for pair in skipped:
            self._skips.add(pair)
        self._skips.stop_above(self._config.max_bad_fraction, out_of=planned.out_of)


def _plan(data: OpenedData, config: DataConfig, *, run_seed: int, skips: SkipLog) -> AbstractPlan:
    """The order in which the data is seen."""
    square = (config.resolution, config.resolution)
    if isinstance(data.rows, AbstractRowStream):
        return StreamPlan(
            data,
            run_seed=run_seed,
            block_rows=config.shuffle_block,
            limit=config.limit,
            target=square,
        )
    index = index_rows(data.rows, data.columns, limit=config.limit, skips=skips)
    if not config.buckets:
        buckets = {square: np.arange(len(index.members))}
    else:
        buckets = assign_buckets(data, index, config, skips)
    return IndexPlan(index, run_seed=run_seed, buckets=buckets)


def _stack_if_usable(results: list[Sample | Skipped]) -> ImageBatch | list[Sample | Skipped]:
    """In the worker: the batch, unless the training process has to replace some of it."""
    samples = [result for result in results if isinstance(result, Sample)]
    return stack(samples) if len(samples) == len(results) else results


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; the trainer alone decides, and it needs its
    workers until the step is finished. They end with their parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
