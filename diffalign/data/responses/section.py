"""The `responses:` section of a run: what it goes with, what it opens, and a look at it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from rich.markup import escape
from rich.table import Table

from diffalign import components, config
from diffalign.data.batches import TokenBatch
from diffalign.data.decoding import size_in_words
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.samples import ResponsePreviewRow
from diffalign.data.responses.source import ResponseSource
from diffalign.data.section import (
    AbstractSourceSection,
    RunParts,
    ShownSource,
    SourceRequest,
    refusal_of,
    warnings_of,
)
from diffalign.data.strength.settings import refuse_unread
from diffalign.errors import ConfigError, DataError
from diffalign.views import View

SHOWN_CHARACTERS = 60
"""How much of a prompt or a response a preview shows."""


class ReadsResponses(Protocol):
    """What responses ask of a model."""

    @property
    def context(self) -> int | None:
        """Tokens of the longest row that it has positions for; None for any."""

    def processor(self) -> Any:
        """A transformers processor with a chat template."""


class MakesViews(Protocol):
    """What responses ask of a likelihood."""

    def data_views(self, views: frozenset[str]) -> frozenset[str]:
        """The views that have to be read for `views` to be measured."""

    def shares_prefix(self, model: Any) -> bool:
        """Whether the responses of a sample are branches of one row."""

    def packing_obstacle(self, model: Any) -> str | None:
        """Why rows do not go one after the other through a model; None where they can."""


@dataclass(frozen=True)
class ResponseSection(AbstractSourceSection[ReadsResponses, MakesViews]):
    """Preferences between responses about images."""

    config: ResponseConfig

    batch_type: ClassVar[type] = TokenBatch
    kept_in_advance: ClassVar[bool] = True

    @property
    def origin(self) -> str:
        return self.config.section

    @property
    def views(self) -> None:
        return None

    @property
    def savings(self) -> str:
        return (
            ". With responses, likelihood.concatenated: false sends one view after the other, a "
            "lower model.positions_at_once makes fewer logits at once, a lower "
            "responses.max_length leaves long responses out, and training.tokens_per_device bounds "
            "what goes through the model at once"
        )

    def check(self, parts: RunParts[ReadsResponses, MakesViews]) -> None:
        asked = dict(self.config.strength.asked)
        if self.config.ties == "keep":
            asked.setdefault("preference", "ties is keep")
        refuse_unread(
            self.config.section,
            asked,
            parts.objective,
            alternative="Leave the setting at its default, or take an objective such as dpo",
        )
        try:
            parts.likelihood.data_views(parts.objective.views)
        except ValueError as error:
            raise ConfigError(
                f"likelihood {components.kind_of(parts.likelihood)}: {error}"
            ) from error

    def open(self, request: SourceRequest[ReadsResponses, MakesViews]) -> ResponseSource:
        longest = min(self.config.max_length, request.model.context or self.config.max_length)
        objective = request.objective
        return ResponseSource.open(
            replace(self.config, max_length=longest),
            views=request.likelihood.data_views(objective.views),
            served=objective.views,
            run_seed=request.run_seed,
            layout=request.layout,
            processor=request.model.processor(),
            skipped=request.skipped,
            pairs_for=None if objective.takes_unpaired else components.kind_of(objective),
            shares_prefix=request.likelihood.shares_prefix(request.model),
            packing_obstacle=request.likelihood.packing_obstacle(request.model),
        )

    def preview(self, request: SourceRequest[ReadsResponses, MakesViews], n: int) -> ShownSource:
        most = self.config.max_bad_fraction
        source = ResponseSection(replace(self.config, max_bad_fraction=1.0)).open(request)
        shown = source.preview(n)
        refusal = refusal_of(shown.rows, self.origin, fix="image_folder, columns, max_length")
        return ShownSource(
            lines=shown.lines,
            tables=[_table(row) for row in shown.rows],
            warnings=warnings_of(shown.rows, self.origin, most),
            refusal=refusal or _too_many_unusable(source, most),
        )

    def varying_views(self, views: frozenset[str]) -> frozenset[str]:
        return frozenset(view for view in views if View.parse(view).condition)

    def visits_in_advance(self, views: frozenset[str]) -> int:
        conditions = _conditions(views)
        if conditions and self.config.visits is None:
            raise ConfigError(
                f"the objective shows images under {', '.join(conditions)}, which "
                f"responses.visits: null samples anew at every visit: set it to the number of "
                f"samples to compute, such as 4 (epoch e then shows sample e modulo 4), or to 1 "
                f"where nothing about the condition is random (zero, replaced)"
            )
        return (self.config.visits or 1) if conditions else 1

    def defining_settings(self, views: frozenset[str]) -> Mapping[str, Any]:
        responses = config.to_dict(self.config)
        weights = {str(view.weights) for view in map(View.parse, views) if view.weights}
        conditions = _conditions(views)
        return {
            **{f"responses.{key}": responses[key] for key in ("kind", "columns", "max_length")},
            **({"responses.ties": "keep"} if self.config.ties == "keep" else {}),
            **{f"responses.conditions.{n}": responses["conditions"][n] for n in conditions},
            **{f"responses.weights.{n}": responses["weights"][n] for n in sorted(weights)},
        }


def _conditions(views: frozenset[str]) -> list[str]:
    """Names of those that the images of some view are seen under."""
    return sorted({str(view.condition) for view in map(View.parse, views) if view.condition})


def _too_many_unusable(source: ResponseSource, most: float) -> DataError | None:
    """Why a run would end when it opens this data, which is shown first."""
    try:
        source.stop_above(most)
    except DataError as error:
        return error
    return None


def _table(row: ResponsePreviewRow) -> Table:
    sizes = ", ".join(map(size_in_words, row.images))
    table = Table("pair", escape(row.sample_id), box=None)
    table.add_row("images", escape(f"{len(row.images)}: {sizes}" if sizes else "0"))
    own = {f"prompt of {name}": text for name, text in row.own.items()}
    for name, text in {"prompt": row.prompt, **own, **row.responses}.items():
        table.add_row(name, escape(_shortened(text)))
    if row.unusable is not None:
        table.add_row("[yellow]skipped", escape(row.unusable))
    return table


def _shortened(text: str) -> str:
    return textwrap.shorten(text, SHOWN_CHARACTERS, placeholder=" ...")
