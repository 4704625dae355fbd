"""The `rollouts:` section of a run, with the `data:` section next to it where it reads that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from diffalign import components
from diffalign.data.pairs.section import PairSection
from diffalign.data.section import (
    COUNTED_CAPTIONS,
    AbstractSourceSection,
    RunParts,
    ShownSource,
    SourceRequest,
)
from diffalign.data.source import AbstractSource
from diffalign.data.strength.settings import refuse_unread
from diffalign.errors import ConfigError
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.rollouts.base import AbstractRollouts, RunContext


@dataclass(frozen=True)
class RolloutSection(AbstractSourceSection[Any, AbstractLikelihood]):
    """Samples of the model in training."""

    rollouts: AbstractRollouts
    data: PairSection | None = None

    reader: ClassVar[str] = "data"

    @property
    def batch_type(self) -> type:
        return self.rollouts.batch_type

    @property
    def origin(self) -> str:
        return f"rollouts {components.kind_of(self.rollouts)}"

    @property
    def views(self) -> frozenset[str]:
        return self.rollouts.views

    @property
    def caption_dropout(self) -> float:
        return 0.0 if self.data is None else self.data.caption_dropout

    @property
    def savings(self) -> str:
        return (
            ". If it was sampling, lower rollouts.prompts_per_batch or images_per_batch, and "
            "model.images_per_encoding, instead"
        )

    def describe(self) -> str:
        return self.rollouts.describe()

    def check(self, parts: RunParts[Any, AbstractLikelihood]) -> None:
        if self.data is not None and not self.rollouts.needs_data:
            raise ConfigError(
                f"data names {self.data.config.path}, but {self.origin} samples all that it "
                f"trains on: remove the data section, or the rollouts section"
            )
        if parts.model.makes != self.rollouts.makes:  # a likelihood is asked after this
            raise ConfigError(
                f"{self.origin} samples {self.rollouts.makes}, and the model "
                f"{components.kind_of(parts.model)} makes {parts.model.makes or 'none'}: take "
                f"rollouts of what it makes, or remove the rollouts section"
            )
        if self.data is not None and self.data.config.holdout is not None:
            raise ConfigError(
                f"data.holdout is {self.data.config.holdout:g}, and {self.origin} trains on "
                f"samples of the policy, which are new in every round and cannot be held out: set "
                f"data.holdout to null"
            )
        if self.data is not None and self.data.config.scores.tag is not None:
            raise ConfigError(
                f"data.scores.tag tells the scores of images in their prompts, and {self.origin} "
                f"trains on samples as well, which have none: leave tag out"
            )
        if self.data is not None:
            self.data.check(parts)
            return
        refuse_unread(
            "rollouts",
            self.rollouts.strength,
            parts.objective,
            alternative="Set it to null, or take an objective such as clipped_dpo",
        )

    def open(self, request: SourceRequest[Any, AbstractLikelihood]) -> AbstractSource:
        return self.rollouts.open(
            RunContext(
                folder=request.output / "rounds",
                run_seed=request.run_seed,
                model=request.model,
                settings=request.settings,
                layout=request.layout,
                process=request.likelihood.reverse_process(),
                console=request.console,
                open_data=self._open_data(request),
            )
        )

    def _open_data(
        self, request: SourceRequest[Any, AbstractLikelihood]
    ) -> Callable[[frozenset[str]], AbstractSource]:
        def open_data(views: frozenset[str]) -> AbstractSource:
            if self.data is None:
                raise ConfigError(f"{self.origin} read the data section, which is null: give it")
            return self.data.open_views(request, views)

        return open_data

    def preview(self, request: SourceRequest[Any, AbstractLikelihood], n: int) -> ShownSource:
        data = self.data and self.data.without_download()
        source = RolloutSection(self.rollouts, data).open(request)
        return ShownSource(lines=source.describe(), captions=source.captions(COUNTED_CAPTIONS))
