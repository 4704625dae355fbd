"""Preferences between responses as a source of batches: mapping, index, plan, tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from PIL.Image import Image
from torch.utils.data import Dataset

from diffalign.data.batches import TokenBatch
from diffalign.data.decoding import BadImageError, EncodedImage, decode
from diffalign.data.held_out import HeldOut, group_of_images
from diffalign.data.layout import Layout
from diffalign.data.loader import PlannedBatches
from diffalign.data.plans import IndexPlan, Work
from diffalign.data.responses.chat import ChatEncoder
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.index import Comparisons, index_comparisons
from diffalign.data.responses.micro_batches import (
    AboutLengths,
    MicroBatches,
    ModelRows,
    check_budget,
    rows_of_sample,
)
from diffalign.data.responses.reading import OpenedResponses, open_responses
from diffalign.data.responses.records import Turn
from diffalign.data.responses.samples import (
    ResponsePreviewRow,
    TokenSample,
    TokenSampleMaker,
    preview_row,
)
from diffalign.data.skipping import SkipLog, Skipped
from diffalign.data.source import AbstractDataSource, Preview
from diffalign.errors import ConfigError, DataError
from diffalign.seeding import derive_seed
from diffalign.views import View

_LOOKED_AT = 1000
"""Pairs among which conversations are looked for."""
_MEASURED = 24
"""Samples from which it is learnt how many tokens a text has."""
_ATTEMPTS = 100
"""Rows that are tried for an image of another sample."""


@dataclass(frozen=True)
class _Decoder(Dataset):
    """The work of a loader's process; indexed by `Work`, in place of a number."""

    data: OpenedResponses
    comparisons: Comparisons
    maker: TokenSampleMaker

    def __getitem__(self, work: Work) -> TokenSample | Skipped:
        assert isinstance(work.pair, int)
        row, place = self.comparisons.places[work.pair].tolist()
        pair = self.data.pair(row, place)
        return pair if isinstance(pair, Skipped) else self.maker.make(pair, work.visit)


@dataclass(frozen=True)
class _OtherImages:
    """An image of a row that a sample is not of; None where none is found."""

    data: OpenedResponses
    comparisons: Comparisons

    def __call__(self, sample_id: str, seed: int) -> EncodedImage:
        for attempt in range(_ATTEMPTS):
            number = derive_seed(seed, "another", attempt) % len(self.comparisons.places)
            row, place = self.comparisons.places[number].tolist()
            if self.data.is_of_row(sample_id, row):
                continue
            pair = self.data.pair(row, place)
            if not isinstance(pair, Skipped) and pair.images:
                return pair.images[seed % len(pair.images)]
        return None


class ResponseSource(AbstractDataSource[TokenSample, TokenBatch]):
    """Pairs of responses in random order, for ever."""

    batch_type: ClassVar[type] = TokenBatch

    def __init__(
        self,
        data: OpenedResponses,
        comparisons: Comparisons,
        maker: TokenSampleMaker,
        skips: SkipLog,
        *,
        served: frozenset[str],
        layout: Layout,
        rows: ModelRows,
        packing_obstacle: str | None = None,
    ) -> None:
        """Use `open`; this takes the parts."""
        self.views = served
        collate = MicroBatches(
            pad_token_id=maker.encoder.pad_token_id,
            served=served,
            tokens=layout.tokens_per_device,
            rows=rows,
        )
        if comparisons.held_out is not None:
            self.held_out = _held_out(data, comparisons.held_out, maker, collate, layout=layout)
        self._data = data
        self._comparisons = comparisons
        self._maker = maker
        self._layout, self._rows = layout, rows
        self._packing_obstacle = packing_obstacle
        self._lengths = self._about_lengths()
        self._plan = IndexPlan(
            comparisons.index,
            run_seed=maker.run_seed,
            buckets={None: comparisons.index.members},
            passes=1 if maker.config.ranking is None else maker.config.ranking.passes,
            sizes=None if self._lengths is None else self._lengths.rows.sum(axis=1),
        )
        batches: PlannedBatches[TokenSample, TokenBatch] = PlannedBatches(
            self._plan,
            _Decoder(data, comparisons, maker),
            collate,
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
        config: ResponseConfig,
        *,
        views: frozenset[str],
        run_seed: int,
        layout: Layout,
        processor: Any,
        skipped: Path | None,
        served: frozenset[str] | None = None,
        pairs_for: str | None = None,
        shares_prefix: bool = False,
        packing_obstacle: str | None = None,
    ) -> ResponseSource:
        """Find the data, recognise its form, and index its text; no image is read.

        Args:
            config: the `responses:` section.
            views: what is read.
            run_seed: from which every random choice derives.
            layout: which samples are this rank's, and how many it takes at once.
            processor: of the model, a transformers processor with a chat template.
            skipped: where unusable samples are listed (`skipped.jsonl` of the run folder), shared
                by all ranks; None keeps them in memory.
            served: what the objective asks for, where the likelihood makes a part of it; None if
                it is what is read.
            pairs_for: the objective, where it compares responses to one prompt; None where it also
                takes rows of one response each.
            shares_prefix: whether the model takes the responses of a sample as branches of one row.
            packing_obstacle: why it takes no rows one after the other; None where it does.

        Raises:
            DataError: nothing is there, no mapping fits its columns, it holds no preference, it
                does not offer a response that a view names, or its rows are unpaired and
                `pairs_for` needs pairs.
            ConfigError: a view names a condition or weights that the config does not describe, or a
                sample may have more tokens than a forward pass.
            ModelError: the processor cannot tell where a response starts.
        """
        data = open_responses(config, strength=config.strength, keep_ties=config.ties == "keep")
        if pairs_for is not None and not data.mapping.paired:
            raise DataError(
                f"{data.summary}. Its rows are unpaired, each with one response, and the objective "
                f"{pairs_for} compares two responses to one prompt: use kto, bco, npo or sft, or "
                f"data with chosen and rejected responses"
            )
        if config.ranking is not None and not data.mapping.paired:
            raise DataError(
                f"{data.summary}. Its rows have one response each, and responses.ranking is about "
                f"pairs: leave it out"
            )
        _check_responses(views, data)
        skips = SkipLog(skipped, section=config.section)
        read = frozenset(View.parse(name).response for name in views)
        comparisons = index_comparisons(
            data,
            limit=config.limit,
            skips=skips,
            asked_for=None if data.mapping.paired else read,
            holdout=config.holdout,
            ranking=config.ranking,
            measured=None if layout.tokens_per_device is None else read,
        )
        check_budget(
            layout.tokens_per_device,
            rows=rows_of_sample(views, paired=data.mapping.paired),
            max_length=config.max_length,
        )
        maker = TokenSampleMaker(
            config=config,
            views=views,
            run_seed=run_seed,
            encoder=ChatEncoder(processor, max_length=config.max_length),
            another_image=_OtherImages(data, comparisons),
        )
        return cls(
            data,
            comparisons,
            maker,
            skips,
            served=views if served is None else served,
            layout=layout,
            rows=ModelRows(
                shared=shares_prefix and data.mapping.paired,
                pack_to=None if packing_obstacle else config.pack_to,
            ),
            packing_obstacle=packing_obstacle,
        )

    def further_lines(self) -> list[str]:
        return [*self._lines_of_kinds(), *self._lines_of_rows()]

    def _lines_of_rows(self) -> list[str]:
        """How samples are cut by length, and whether rows are packed."""
        asked, lines = self._maker.config.pack_to, []
        if asked is not None and self._rows.pack_to is not None:
            lines.append(f"rows are packed into sequences of up to {asked:,} tokens")
        elif asked is not None:
            lines.append(
                f"rows are not packed, since {self._packing_obstacle}: each is padded to the "
                f"longest of its forward pass"
            )
        if self._lengths is not None:
            lines.append(self._lengths.describe(self._plan, self._layout, self._rows.pack_to))
        return lines

    def _about_lengths(self) -> AboutLengths | None:
        """Of all samples, from the first of them; None where nothing is cut by length."""
        sizes = self._comparisons.sizes
        if sizes is None:
            return None
        made = []
        for number, (row, place) in enumerate(self._comparisons.places[:_MEASURED].tolist()):
            pair = self._data.pair(row, place)
            sample = pair if isinstance(pair, Skipped) else self._maker.make(pair, 0)
            if not isinstance(sample, Skipped):
                made.append((number, sample))
        return AboutLengths.of(sizes, made, shared=self._rows.shared)

    def _lines_of_kinds(self) -> list[str]:
        if self.paired:
            return self._ranking_lines()
        kinds = {"chosen": "desirable", "rejected": "undesirable"}
        read = {View.parse(view).response for view in self.views}
        counts = {kinds[n]: self._comparisons.labels.get(n, 0) for n in kinds if n in read}
        shown = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
        warning = "; with one kind alone the objective has nothing to weigh it against"
        return [f"rows of one response: {shown}{warning * (0 in counts.values())}"]

    def state_dict(self) -> dict[str, Any]:
        ranking = self._maker.config.ranking
        known = {} if ranking is None else {"ranking": ranking.fingerprint()}
        return {**super().state_dict(), **known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        ranking = self._maker.config.ranking
        position = dict(state)
        if ranking is not None and position.pop("ranking", None) != ranking.fingerprint():
            raise DataError(
                f"the checkpoint was written with other numbers than those of "
                f"responses.ranking.file {ranking.file}: the order of the pairs would be another "
                f"one. Resume with the same file, or start a new run"
            )
        super().load_state_dict(position)

    @property
    def data_fingerprint(self) -> str:
        """Another one for other data, however many of its pairs are taken."""
        return self._data.fingerprint

    def _ranking_lines(self) -> list[str]:
        ranking = self._maker.config.ranking
        if ranking is None:
            return []
        unknown = self._comparisons.unranked
        lost = f"; {unknown:,} pairs without that number are left out" if unknown else ""
        return [f"{ranking.describe()}: {len(self):,} pairs{lost}"]

    @property
    def paired(self) -> bool:
        """Whether a row holds responses that compete."""
        return self._data.mapping.paired

    def fixed_samples(self) -> ResponseSource:
        if not self.paired:
            raise ConfigError(
                "reference is cached, and the data has unpaired rows, of which each has some of "
                "the views only: their reference values are not kept in advance. Leave reference "
                "at auto"
            )
        return self

    def stop_above(self, share: float) -> None:
        """Raise DataError where more than this share of the pairs is unusable as text."""
        self._batches.stop_above(share)

    def preview(self, n: int) -> Preview[ResponsePreviewRow]:
        """The preview of a dry run: the lines of `describe`, and the first `n` pairs."""
        places = self._comparisons.places[:n].tolist()
        rows = [preview_row(self._data.pair(row, place), self._maker) for row, place in places]
        return Preview(lines=self.describe(), rows=rows)

    def conversations(self, n: int) -> list[tuple[Sequence[Turn], Sequence[Image]]]:
        """Of the first pairs that can be used, each image and question once."""
        found: dict[str, tuple[Sequence[Turn], Sequence[Image]]] = {}
        for row, place in self._comparisons.places[:_LOOKED_AT].tolist():
            if len(found) == n:
                break
            pair = self._data.pair(row, place)
            if isinstance(pair, Skipped):
                continue
            text = "\n".join(turn.text for turn in pair.turns)
            with contextlib.suppress(BadImageError):
                images = [decode(i, max_pixels=self._maker.config.max_pixels) for i in pair.images]
                found.setdefault(group_of_images(pair.images, "") + text, (pair.turns, images))
        return list(found.values())

    def __len__(self) -> int:
        """How many pairs are usable as text."""
        return len(self._comparisons.places)

    def sweep(self, visits: Sequence[tuple[int, int]]) -> Iterator[TokenBatch]:
        """Visits of pairs in this order, whatever the rank and the position.

        Those that cannot be used are counted and left out.

        Args:
            visits: the number of a pair, from 0 to `len(self) - 1`, and which sample of its random
                conditions is shown.

        Raises:
            DataError: more pairs than `responses.max_bad_fraction` allows cannot be used.
        """
        return self._batches.sweep([Work(number, visit, None) for number, visit in visits])

    def __iter__(self) -> Iterator[TokenBatch]:
        return iter(self._batches)


def _held_out(
    data: OpenedResponses,
    comparisons: Comparisons,
    maker: TokenSampleMaker,
    collate: MicroBatches,
    *,
    layout: Layout,
) -> HeldOut[TokenBatch]:
    """The held-out pairs, under conditions that are the same for every run."""
    index = comparisons.index
    batches: PlannedBatches[TokenSample, TokenBatch] = PlannedBatches(
        IndexPlan(index, run_seed=0, buckets={None: index.members}),
        _Decoder(data, comparisons, replace(maker, run_seed=0)),
        collate,
        SkipLog(None, section=maker.config.section),
        layout=layout,
        max_bad_fraction=1.0,
        workers=maker.config.workers,
        run_seed=0,
    )
    return HeldOut(batches, {None: index.held_out}, per_batch=layout.samples_per_device)


def _check_responses(views: frozenset[str], data: OpenedResponses) -> None:
    for name in sorted(views):
        response = View.parse(name).response
        if response not in data.mapping.responses:
            raise DataError(
                f"{data.summary}. It offers the responses {', '.join(data.mapping.responses)}, and "
                f"the objective needs {response} for its view {name}: it wants another kind of data"
            )
