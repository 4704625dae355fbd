"""The `data:` section of a run: what it goes with, what it opens, and a look at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from rich.markup import escape
from rich.table import Table

from diffalign import config
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
from diffalign.data.strength.settings import refuse_unread
from diffalign.errors import ConfigError
from diffalign.timesteps import TimestepSampling

_SEEN = (
    *("columns", "labels", "ties", "limit", "holdout", "max_pixels"),
    *("resolution", "buckets", "crop", "crops", "flip", "caption_dropout", "visits"),
)
"""Settings that decide which pairs there are and what is seen of them."""


class NoisesImages(Protocol):
    """What image pairs ask of a model."""

    def noising(self) -> Any:
        """Its noise process, which has a `schedule_length` in steps."""


class VisitsTimes(Protocol):
    """What image pairs ask of a likelihood."""

    def timestep_sampling(self) -> TimestepSampling:
        """Which noise levels are visited."""

    @property
    def needs_captions(self) -> bool:
        """Whether it reads captions in place of prompts."""

    @property
    def replaced_strength(self) -> frozenset[str]:
        """Parts of a pair's strength that it says itself."""

    def data_views(self, views: frozenset[str]) -> frozenset[str]:
        """Of which views images are needed for these to be measured."""


@dataclass(frozen=True)
class PairSection(AbstractSourceSection[NoisesImages, VisitsTimes]):
    """Pairs of images, or preferred images alone."""

    config: PairConfig

    batch_type: ClassVar[type] = ImageBatch
    kept_in_advance: ClassVar[bool] = True

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
        if self.config.scores.tag is not None and parts.likelihood.needs_captions:
            raise ConfigError(
                "data.scores.tag puts scores into prompts, and a preference model scores images "
                "against the captions of the data: leave tag out"
            )
        asked = dict(self.config.strength.asked)
        for part in sorted(parts.likelihood.replaced_strength & asked.keys()):
            raise ConfigError(
                f"data.{asked[part]}, and likelihood.relabel labels every pair anew: set one of "
                f"them to its default"
            )
        if self.config.ties == "keep":
            asked.setdefault("preference", "ties is keep")
        if self.config.weighting == "per_prompt":
            asked.setdefault("weight", "weighting is per_prompt")
        refuse_unread(
            self.config.section,
            asked,
            parts.objective,
            alternative="Leave the setting at its default, or take an objective such as dpo",
        )

    def open(self, request: SourceRequest[NoisesImages, VisitsTimes]) -> PairSource:
        views = request.likelihood.data_views(request.objective.views)
        return self.open_views(request, views)

    def open_views(
        self, request: SourceRequest[NoisesImages, VisitsTimes], views: frozenset[str]
    ) -> PairSource:
        """The batches of a run with other views than its objective reads."""
        return PairSource.open(
            self.config,
            views=views,
            run_seed=request.run_seed,
            layout=request.layout,
            timesteps=request.likelihood.timestep_sampling(),
            schedule_length=request.model.noising().schedule_length,
            skipped=request.skipped,
            encodings=request.encodings,
        )

    def varying_views(self, views: frozenset[str]) -> frozenset[str]:
        return views

    def visits_in_advance(self, views: frozenset[str]) -> int:
        if self.config.streaming:
            raise ConfigError(
                "reference is cached, and data.streaming is true: a stream does not know its pairs "
                "in advance. Read the data at random (streaming: false), or leave reference at auto"
            )
        if self.config.visits is None:
            raise ConfigError(
                "reference is cached, and data.visits is null: time and noise of an image pair are "
                "new at every visit then, and so is what the reference says of it. Set data.visits "
                "to how often the run sees a pair (its epochs, such as 5), or leave reference at "
                "auto"
            )
        return self.config.visits

    def describe_visits(self, most: int | None, *, reference_is_cached: bool) -> str:
        visits, reuse = self.config.visits, self.config.reuse_visits
        if visits is None:
            return ""
        known = f"each pair has {visits} draws of what is random (data.visits)"
        if most is None or most <= visits:
            return known if most is None else f"{known}, of which this run takes {most} at most"
        if reference_is_cached and not reuse:
            raise ConfigError(
                f"data.visits is {visits}, and this run sees a pair up to {most} times: the "
                f"reference was computed for {visits} draws of time and noise a pair, and from "
                f"the visit after those on a pair would be trained on under noise that it has seen "
                f"before. Set data.visits to {most} and precompute again, take fewer "
                f"training.optimizer_steps, or say that this is meant with data.reuse_visits: true"
            )
        return f"{known}, and this run sees a pair up to {most} times: they come again"

    def defining_settings(self, views: frozenset[str]) -> Mapping[str, Any]:
        settings = config.to_dict(self.config)
        added = {"annotators": None, "group_pairs": "all"}  # since older caches were made
        seen = (*_SEEN, *(name for name, default in added.items() if settings[name] != default))
        scores = {name: settings["scores"][name] for name in ("filter", "tag")}
        return {
            **{f"data.{name}": settings[name] for name in seen},
            **{f"data.scores.{name}": value for name, value in scores.items() if value},
        }

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
