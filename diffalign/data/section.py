"""The section of a config that batches come from: what each kind of it says for itself.

A run asks its section, and need not know whether that reads images or responses, or samples from
the model in training.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from rich.console import Console
from rich.table import Table

from diffalign.data.layout import Layout
from diffalign.data.pairs.encoded import OpensEncodings
from diffalign.data.source import AbstractSource
from diffalign.errors import DataError

Model = TypeVar("Model", covariant=True)
Likelihood = TypeVar("Likelihood", covariant=True)
AskedModel = TypeVar("AskedModel")
AskedLikelihood = TypeVar("AskedLikelihood")

COUNTED_CAPTIONS = 1000
"""Captions whose length is looked at when a run starts."""


class Wants(Protocol):
    """What a section asks of an objective."""

    @property
    def views(self) -> frozenset[str]:
        """Names of the views that it reads."""

    @property
    def takes_strength(self) -> Collection[str]:
        """The parts of a pair's strength that it reads: fields of `Strength`."""

    @property
    def needs_strength(self) -> Collection[str]:
        """Those without which it has no loss."""

    @property
    def takes_unpaired(self) -> bool:
        """Whether it can do with rows of one response each."""


@dataclass(frozen=True, kw_only=True)
class RunParts(Generic[Model, Likelihood]):
    """The settings that a section has to go with; nothing is loaded."""

    model: Model
    likelihood: Likelihood
    objective: Wants


@dataclass(frozen=True, kw_only=True)
class SourceRequest(RunParts[Model, Likelihood]):
    """What a run tells the section that it takes batches from."""

    output: Path
    """The run folder; every process must see the same files there."""
    run_seed: int
    """From which every random choice derives."""
    layout: Layout
    """How ranks and forward passes share the samples of an optimiser step."""
    settings: str
    """Everything in the config that shapes the run, in a form that equal settings share."""
    skipped: Path | None
    """Where unusable samples are listed, shared by all ranks; None keeps them in memory."""
    console: Console
    """For progress; silent on all ranks but the main one."""
    encodings: OpensEncodings | None = None
    """Opens what was computed in advance of image pairs; None where the model encodes."""


class UsableOrNot(Protocol):
    """A row of a preview."""

    @property
    def sample_id(self) -> str:
        """Of the sample."""

    @property
    def unusable(self) -> str | None:
        """Why training will skip it; None if it will not."""


@dataclass(frozen=True, kw_only=True)
class ShownSource:
    """What a dry run prints of the batches to come."""

    lines: Sequence[str]
    """How the data is read, and what its rows are, as sentences."""
    captions: Sequence[str] = ()
    """The first captions; none where they are not those of images."""
    tables: Sequence[Table] = ()
    """Of the first samples."""
    warnings: Sequence[str] = ()
    """What a run would go on with, and its user may want to know before."""
    refusal: DataError | None = None
    """Why a run would end with this data; raised when the rest was shown."""


class AbstractSourceSection(abc.ABC, Generic[AskedModel, AskedLikelihood]):
    """A section that batches come from.

    The two type parameters are what it asks of a run's model and likelihood. They hold where the
    run was checked: a likelihood refuses the models that it cannot measure, and is refused where it
    takes other batches than the section gives.
    """

    @property
    @abc.abstractmethod
    def batch_type(self) -> type:
        """What its source yields."""

    @property
    @abc.abstractmethod
    def origin(self) -> str:
        """Where batches come from, for messages: `data`, `rollouts spo`."""

    @property
    def reader(self) -> str:
        """The section whose `workers` read from disk."""
        return self.origin

    @property
    @abc.abstractmethod
    def views(self) -> frozenset[str] | None:
        """Names of the views that it can give; None where only the data knows."""

    @property
    def caption_dropout(self) -> float:
        """Share of the samples that are seen without their caption."""
        return 0.0

    @abc.abstractmethod
    def check(self, parts: RunParts[AskedModel, AskedLikelihood]) -> None:
        """Raise ConfigError for what does not go together, before data or weights are opened."""

    def describe(self) -> str:
        """One line for the start of a run, where opening it does not say all; may be empty."""
        return ""

    @abc.abstractmethod
    def open(self, request: SourceRequest[AskedModel, AskedLikelihood]) -> AbstractSource:
        """The batches of a run on this rank; opening them reads no image.

        Raises:
            DataError: nothing is there, or it is not what the objective needs.
            ConfigError: settings of the section contradict what was found.
        """

    @abc.abstractmethod
    def preview(self, request: SourceRequest[AskedModel, AskedLikelihood], n: int) -> ShownSource:
        """A look at the first `n` samples, without downloading or indexing more than it takes.

        Raises:
            DataError: see `open`.
        """

    kept_in_advance: ClassVar[bool] = False
    """Whether a reference can be computed for its samples before a run."""

    def varying_views(self, views: frozenset[str]) -> frozenset[str]:
        """Those of these views of which the reference sees something else at each visit."""
        return frozenset()

    def describe_visits(self, most: int | None, *, reference_is_cached: bool) -> str:
        """One line on how many visits of a sample differ, and how many the run takes; may be empty.

        Args:
            most: visits of the sample that the run visits most; None where nobody knows.
            reference_is_cached: whether there are values of the reference for no others.

        Raises:
            ConfigError: the run takes more than there are, and was not told to.
        """
        return ""

    def visits_in_advance(self, views: frozenset[str]) -> int:
        """How many visits of a sample differ in what the reference sees of these views.

        Raises:
            ConfigError: as many as there are visits.
        """
        return 1

    def defining_settings(self, views: frozenset[str]) -> Mapping[str, Any]:
        """The settings that the reference's values of these views depend on, by dotted key."""
        return {}

    @property
    @abc.abstractmethod
    def savings(self) -> str:
        """What saves memory with these batches, as the end of a sentence."""


def warnings_of(rows: Sequence[UsableOrNot], section: str, most: float) -> list[str]:
    """What to say where some of the rows shown, and not all, cannot be used.

    Args:
        rows: of a preview.
        section: of the config.
        most: share of unusable samples at which a run stops.
    """
    bad = sum(row.unusable is not None for row in rows)
    if bad in (0, len(rows)):
        return []
    return [
        f"{bad} of the {len(rows)} pairs shown cannot be used: a run stops once more than "
        f"{section}.max_bad_fraction = {most:g} of all are so"
    ]


def refusal_of(rows: Sequence[UsableOrNot], section: str, *, fix: str) -> DataError | None:
    """The error where none of the rows shown can be used, which `fix` may fix: names of keys."""
    if not rows or not all(row.unusable for row in rows):
        return None
    return DataError(
        f"none of the first {len(rows)} pairs can be used, for example {rows[0].sample_id}: "
        f"{rows[0].unusable}. Fix the data, or the settings under {section} that it depends on: "
        f"{fix}"
    )
