"""The `data:` section of a run: what it goes with, what it opens, and a look at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from rich.markup import escape
from rich.table import Table

from diffalign import components
from diffalign.data.batches import ImageBatch
from diffalign.data.decoding import size_in_words
from diffalign.data.pairs.columns import PAIR_VIEWS
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.preview import PairPreviewRow, without_download
from diffalign.data.pairs.source import PairSource
from diffalign.data.section import (
    COUNTED_CAPTIONS,
    AbstractSourceSection,
    RunParts,
    ShownSource,
    SourceRequest,
    refusal_of,
    warnings_of,
)
from diffalign.errors import ConfigError
from diffalign.timesteps import TimestepSampling


class NoisesImages(Protocol):
    """What image pairs ask of a model."""

    def noising(self) -> Any:
        """Its noise process, which has a `schedule_length` in steps."""


class VisitsTimes(Protocol):
    """What image pairs ask of a likelihood."""

    def timestep_sampling(self) -> TimestepSampling:
        """Which noise levels are visited."""


@dataclass(frozen=True)
class PairSection(AbstractSourceSection[NoisesImages, VisitsTimes]):
    """Pairs of images, or preferred images alone."""

    config: PairConfig

    batch_type: ClassVar[type] = ImageBatch

    @property
    def origin(self) -> str:
        return self.config.section

    @property
    def views(self) -> frozenset[str]:
        return frozenset(PAIR_VIEWS)

    @property
    def caption_dropout(self) -> float:
        return self.config.caption_dropout

    @property
    def savings(self) -> str:
        return ", or lower model.images_per_encoding"

    def check(self, parts: RunParts[NoisesImages, VisitsTimes]) -> None:
        strata = parts.likelihood.timestep_sampling().strata
        if self.config.visits is not None and strata != 1:
            raise ConfigError(
                f"likelihood.timesteps.strata is {strata}, and data.visits is "
                f"{self.config.visits}, which spreads the times of a pair over as many parts "
                f"already: leave strata at 1, or set data.visits to null"
            )
        if parts.objective.takes_ties:
            return
        for name, value, plain in (
            ("ties", self.config.ties, "drop"),
            ("weighting", self.config.weighting, "uniform"),
        ):
            if value != plain:
                raise ConfigError(
                    f"data.{name} is {value}, and the objective "
                    f"{components.kind_of(parts.objective)} takes every pair as decided and alike: "
                    f"use {plain}, or an objective such as bradley_terry"
                )

    def open(self, request: SourceRequest[NoisesImages, VisitsTimes]) -> PairSource:
        return self.open_views(request, request.objective.views)

    def open_views(
        self, request: SourceRequest[NoisesImages, VisitsTimes], views: frozenset[str]
    ) -> PairSource:
        """The batches of a run with other views than its objective reads."""
        return PairSource.open(
            self.config,
            views=views,
            run_seed=request.run_seed,
            pairs_per_device=request.samples_per_device,
            timesteps=request.likelihood.timestep_sampling(),
            schedule_length=request.model.noising().schedule_length,
            skipped=request.skipped,
            encodings=request.encodings,
        )

    def without_download(self) -> PairSection:
        """The section for a look at the data: a hub data set is streamed, its rows not counted.

        Raises:
            DataError: nothing is there.
        """
        return PairSection(without_download(self.config))

    def preview(self, request: SourceRequest[NoisesImages, VisitsTimes], n: int) -> ShownSource:
        source = self.without_download().open(replace(request, encodings=None))  # shows the files
        shown = source.preview(n)
        return ShownSource(
            lines=shown.lines,
            captions=source.captions(COUNTED_CAPTIONS),
            tables=[_table(shown.rows)],
            warnings=warnings_of(shown.rows, self.origin, self.config.max_bad_fraction),
            refusal=refusal_of(shown.rows, self.origin, fix="path, columns, max_pixels"),
        )


def _table(rows: Sequence[PairPreviewRow]) -> Table:
    table = Table("pair", "prompt", "chosen (h, w)", "rejected (h, w)", box=None)
    for row in rows:
        sides = ["none" if s is None else size_in_words(s) for s in (row.chosen, row.rejected)]
        table.add_row(*map(escape, (row.sample_id[:24], row.prompt, *sides)))
    return table
