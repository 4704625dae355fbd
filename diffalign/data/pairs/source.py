"""Preference pairs as a source of batches: readers, plan, and what becomes of a pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch.utils.data import Dataset

from diffalign.data.batches import ImageBatch
from diffalign.data.decoding import Size
from diffalign.data.held_out import HeldOut
from diffalign.data.layout import Layout
from diffalign.data.loader import PlannedBatches
from diffalign.data.pairs.columns import PAIR_VIEWS, ImagePair
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.encoded import (
    AbstractEncodedPairs,
    EncodedPair,
    OpensEncodings,
    PairsToEncode,
)
from diffalign.data.pairs.formats.base import OpenedPairs, open_data
from diffalign.data.pairs.index import assign_buckets, index_rows
from diffalign.data.pairs.preview import PairPreviewRow, first_rows
from diffalign.data.pairs.samples import Sample, SampleMaker, stack, with_unit_range
from diffalign.data.pairs.streamed import StreamPlan
from diffalign.data.plans import AbstractPlan, Index, IndexPlan, Work
from diffalign.data.rows import AbstractRows, AbstractRowStream
from diffalign.data.score_columns import ScoreKey, digest_of
from diffalign.data.skipping import LeftOut, SkipLog, Skipped
from diffalign.data.source import AbstractDataSource, Preview
from diffalign.errors import ConfigError, DataError
from diffalign.timesteps import TimestepSampling


@dataclass(frozen=True)
class _Decoder(Dataset):
    """The work of a loader's process; indexed by `Work`, in place of a number."""

    data: OpenedPairs
    maker: SampleMaker
    encoded: AbstractEncodedPairs | None
    """In place of the data's images and captions."""

    def __getitem__(self, work: Work) -> Sample | Skipped:
        assert work.target is not None
        pair = self._pair(work.pair)
        if isinstance(pair, Skipped):
            return pair
        return self.maker.make(pair, work.visit, work.target)

    def _pair(self, pair: int | ImagePair) -> ImagePair | EncodedPair | Skipped:
        if isinstance(pair, ImagePair):
            return pair
        if self.encoded is not None:
            return self.encoded.pair(pair)
        assert isinstance(self.data.rows, AbstractRows)
        found = self.data.read(self.data.rows[pair])
        assert not isinstance(found, LeftOut), "the index holds pairs only"
        return found


class PairSource(AbstractDataSource[Sample, ImageBatch]):
    """Image pairs in random order, for ever."""

    batch_type: ClassVar[type] = ImageBatch

    def __init__(
        self,
        data: OpenedPairs,
        maker: SampleMaker,
        plan: AbstractPlan,
        skips: SkipLog,
        *,
        layout: Layout,
        held_out: HeldOut[ImageBatch] | None = None,
        to_encode: PairsToEncode | None = None,
        encoded: AbstractEncodedPairs | None = None,
    ) -> None:
        """Use `open`; this takes the parts."""
        self.views = frozenset(maker.views)
        self.held_out = held_out
        self._to_encode = to_encode
        self._data = data
        self._plan = plan
        self._config = maker.config
        batches: PlannedBatches[Sample, ImageBatch] = PlannedBatches(
            plan,
            _Decoder(data, maker, encoded),
            stack,
            skips,
            layout=layout,
            max_bad_fraction=maker.config.max_bad_fraction,
            workers=maker.config.workers,
            run_seed=maker.run_seed,
        )
        super().__init__(data, batches)

    @classmethod
    def open(
        cls,
        config: PairConfig,
        *,
        views: frozenset[str],
        run_seed: int,
        layout: Layout,
        timesteps: TimestepSampling,
        schedule_length: int,
        skipped: Path | None,
        encodings: OpensEncodings | None = None,
    ) -> PairSource:
        """Find the data, choose a reader, and index labels and captions (not of a stream).

        Args:
            config: the `data:` section.
            views: what the objective asks for.
            run_seed: from which every random choice derives.
            layout: which samples are this rank's, and how many it takes at once.
            timesteps: which noise levels are visited.
            schedule_length: of the model's noise schedule, in steps.
            skipped: where unusable samples are listed (`skipped.jsonl` of the run folder), shared
                by all ranks; None keeps them in memory.
            encodings: opens what was computed of its images and captions, which are not read then;
                None where the model encodes.

        Raises:
            DataError: nothing is there, no reader understands it, it holds no preference, it does
                not offer a view, or it is a stream, of which nothing is computed in advance.
            CacheError: what was computed belongs to other settings.
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
        if isinstance(data.rows, AbstractRowStream):
            if encodings is not None:
                raise _streams(data)
            plan = _stream_plan(data, config, run_seed=run_seed)
            return cls(data, maker, plan, skips, layout=layout)
        index = index_rows(
            data.rows, data.columns, limit=config.limit, skips=skips, holdout=config.holdout
        )
        trained = _buckets(data, index, config, skips)
        others = index.of_held_out()
        kept_back = _buckets(data, others, config, SkipLog(None)) if index.held_out else {}
        to_encode = _to_encode(data, maker, [(index, trained), (others, kept_back)])
        encoded = None if encodings is None else encodings(to_encode)
        held_out = None
        if index.held_out:
            held_out = _held_out(data, maker, index, kept_back, encoded, layout=layout)
        return cls(
            data,
            maker,
            IndexPlan(
                index,
                run_seed=run_seed,
                buckets=trained,
                passes=1 if config.scores.order is None else config.scores.order.passes,
            ),
            skips,
            layout=layout,
            held_out=held_out,
            to_encode=to_encode,
            encoded=encoded,
        )

    def pairs_to_encode(self) -> PairsToEncode:
        """All of its pairs, for an encoding in advance.

        Raises:
            DataError: it is a stream.
        """
        if self._to_encode is None:
            raise _streams(self._data)
        return self._to_encode

    def preview(self, n: int) -> Preview[PairPreviewRow]:
        """The preview of a dry run: the lines of `describe`, and the first `n` pairs.

        Raises:
            DataError: a label is not allowed, or no row is a pair.
        """
        return Preview(
            lines=self.describe(), rows=first_rows(self._data, n, self._config, sorted(self.views))
        )

    def captions(self, n: int) -> list[str]:
        """Of a stream, which brings its images along, at most 16; where prompts tell a score, they
        ask for the highest."""
        if isinstance(self._data.rows, AbstractRowStream):
            pairs = islice(self._data.pairs(), min(n, 16))
            captions = [pair.prompt for pair in pairs if isinstance(pair, ImagePair)]
        else:
            columns = self._data.columns
            rows = islice(self._data.rows.scan(columns.light()), n)
            captions = [caption for row in rows if (caption := columns.caption_or_none(row))]
        tag = self._config.scores.tag
        return captions if tag is None else [tag.prompt(tag.highest, text) for text in captions]

    def fingerprint(self) -> str:
        scores = f", scores {self._data.scores}" if self._data.scores else ""
        return f"{super().fingerprint()}{scores}"

    def fixed_samples(self) -> PairSource:
        if not isinstance(self._plan, IndexPlan):
            raise ConfigError(
                f"reference is cached, and {self._data.summary}: a stream does not know its pairs "
                f"in advance. Read a copy at random (parquet, JSON lines, a folder; "
                f"data.streaming: false), or leave reference at auto"
            )
        return self

    def __len__(self) -> int:
        """How many pairs are trained on, those included whose images cannot be used."""
        assert isinstance(self._plan, IndexPlan)
        return len(self._plan.index.members)

    def image_keys(self) -> Iterator[tuple[str, dict[str, ScoreKey]]]:
        """Sample id of each pair that is trained on, and by view what scores know its images by."""
        assert isinstance(self._plan, IndexPlan) and isinstance(self._data.rows, AbstractRows)
        for number in self._plan.index.members.tolist():
            pair = self._data.read(self._data.rows[number])
            if isinstance(pair, ImagePair):
                digests = {view: digest_of(getattr(pair, view)) for view in sorted(self.views)}
                keys = {view: (d, pair.prompt) for view, d in digests.items() if d is not None}
                yield pair.sample_id, keys

    def sweep(self, visits: Sequence[tuple[int, int]]) -> Iterator[ImageBatch]:
        """Visits of pairs size by size of their images, whatever the rank and the position.

        Those that cannot be used are counted and left out.

        Args:
            visits: the number of a pair, from 0 to `len(self) - 1`, and the number of the visit.

        Raises:
            DataError: more pairs than `data.max_bad_fraction` allows cannot be used.
        """
        assert isinstance(self._plan, IndexPlan)
        works = [self._plan.visit(number, visit) for number, visit in visits]
        return map(with_unit_range, self._batches.sweep([work for work in works if work]))

    def __iter__(self) -> Iterator[ImageBatch]:
        return map(with_unit_range, self._batches)


def _streams(data: OpenedPairs) -> DataError:
    return DataError(
        f"model.encoders is cached, and {data.summary}: of a stream nothing is computed in "
        f"advance. Take a copy that is read at random (parquet, JSON lines, a folder), or set "
        f"model.encoders to resident"
    )


def _stream_plan(data: OpenedPairs, config: PairConfig, *, run_seed: int) -> StreamPlan:
    """The order in which a stream is seen."""
    if config.holdout is not None:
        raise DataError(
            f"data.holdout is {config.holdout:g}, and {data.summary}: a stream does not know "
            f"its prompts in advance. Take a copy that is read at random (parquet, JSON lines, "
            f"a folder), or set data.holdout to null"
        )
    return StreamPlan(
        data,
        run_seed=run_seed,
        block_rows=config.shuffle_block,
        limit=config.limit,
        target=(config.resolution, config.resolution),
    )


def _buckets(
    data: OpenedPairs, index: Index, config: PairConfig, skips: SkipLog
) -> dict[Size, np.ndarray]:
    """Target size -> indices into `index.members`."""
    if config.buckets:
        return assign_buckets(data, index, config, skips)
    return {(config.resolution, config.resolution): np.arange(len(index.members))}


def _to_encode(
    data: OpenedPairs,
    maker: SampleMaker,
    parts: Sequence[tuple[Index, Mapping[Size, np.ndarray]]],
) -> PairsToEncode:
    """All pairs that have a size, in the order of the data set."""
    targets = {
        int(index.members[member]): size
        for index, buckets in parts
        for size, members in buckets.items()
        for member in members.tolist()
    }
    numbers = sorted(targets)
    return PairsToEncode(
        data=data,
        config=maker.config,
        views=maker.views,
        numbers=np.array(numbers, dtype=np.int64),
        targets=[targets[number] for number in numbers],
        held_out=frozenset(parts[1][0].members.tolist()),
    )


def _held_out(
    data: OpenedPairs,
    maker: SampleMaker,
    index: Index,
    buckets: Mapping[Size, np.ndarray],
    encoded: AbstractEncodedPairs | None,
    *,
    layout: Layout,
) -> HeldOut[ImageBatch]:
    """The held-out pairs as they are, captioned and unmirrored, under noise that is the same for
    every run."""
    plain = replace(
        maker.config, caption_dropout=0.0, flip=False, crop="center", crops=None, visits=None
    )
    maker = replace(maker, config=plain, run_seed=0)
    batches: PlannedBatches[Sample, ImageBatch] = PlannedBatches(
        IndexPlan(index.of_held_out(), run_seed=0, buckets=buckets),
        _Decoder(data, maker, encoded),
        stack,
        SkipLog(None),
        layout=layout,
        max_bad_fraction=1.0,
        workers=plain.workers,
        run_seed=0,
    )
    pairs = {size: [index.held_out[int(i)] for i in some] for size, some in buckets.items()}
    return HeldOut(batches, pairs, per_batch=layout.samples_per_device, finish=with_unit_range)
