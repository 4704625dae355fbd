"""The contract of an online source: sample a round with the model in training, then train on it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from rich.console import Console

from diffalign.data.layout import Layout
from diffalign.data.source import AbstractSource
from diffalign.errors import ConfigError
from diffalign.models.base import AbstractModel
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.ranges import AtLeast, Ranged

ReferenceRule = Literal["initial", "latest", "uniform"]
"""Which policy is the reference of a round: the one that the run began with, the one that the round
began with, or one sampled uniformly from those that this round and all earlier ones began with."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The part of a run that its source has to know."""

    folder: Path
    """Of all rounds; every process must see the same files there."""
    run_seed: int
    model: AbstractModel
    """The model that is trained, before its weights are read."""
    settings: str
    """Everything in the config that shapes a round, in any form that equal settings share."""
    layout: Layout
    """How ranks and forward passes share the samples of an optimiser step."""
    process: ReverseProcess | None
    """How the likelihood's reverse steps are taken; None where the likelihood takes none."""
    console: Console
    """Silent on all ranks but the main one."""
    open_data: Callable[[frozenset[str]], AbstractSource]
    """Opens the `data:` section for some views; raises ConfigError where there is none."""

    @property
    def diffusion(self) -> AbstractDiffusion:
        """The model, where images are sampled from it."""
        assert isinstance(self.model, AbstractDiffusion), "the section was checked"
        return self.model

    def required_process(self) -> ReverseProcess:
        """How reverse steps are taken.

        Raises:
            ConfigError: the likelihood takes none.
        """
        if self.process is None:
            raise ConfigError(
                "these rollouts yield the steps of a sampler, which the likelihood does not "
                "measure: set likelihood.kind to transition"
            )
        return self.process


@dataclass(frozen=True, kw_only=True)
class AbstractRollouts(Ranged, abc.ABC):
    """How the batches of an online run come about; its fields are the settings of a config."""

    batch_type: ClassVar[type]
    """Type of the batches."""
    views: ClassVar[frozenset[str]]
    """Names of the views in every batch."""
    makes: ClassVar[Literal["images", "responses"]]
    """What is sampled, as `AbstractModel.makes`."""
    needs_data: ClassVar[bool] = False
    """Whether the `data:` section is read."""

    reference: ReferenceRule = "initial"
    """The policy that this round's is compared with: `initial` is the run's first, `latest` the one
    that the round began with, `uniform` one of all that rounds began with."""

    @property
    def strength(self) -> Mapping[str, str]:
        """Parts of a pair's strength that its batches have, and the setting that asks for each."""
        return {}

    @abc.abstractmethod
    def open(self, run: RunContext) -> AbstractSource:
        """The source of a run; whatever can be refused before weights load is refused here."""

    @abc.abstractmethod
    def describe(self) -> str:
        """One line for the start of a run."""


@dataclass(frozen=True, kw_only=True)
class AbstractImageRollouts(AbstractRollouts):
    """Rounds of images."""

    makes: ClassVar[Literal["images", "responses"]] = "images"

    previewed_prompts: Annotated[int, AtLeast(0)] = 4
    """How many prompts every round samples from the same noise, for `preview_strip.png`."""


@dataclass(frozen=True)
class Work:
    """One file of a round that is still to be made; the same on every rank."""

    file: str
    """Its name in the round's folder; where it exists, the work is done."""
    samples: int
    """How many images or responses the work samples or scores, for progress."""
    do: Callable[[Any, Path], None]
    """Writes the file into the given folder, whole or not at all. The result depends on nothing but
    the work, the round and the model in training."""


@dataclass(frozen=True)
class Phase:
    """Works of one kind, which ranks share."""

    title: str
    """The work that is done: `sample`, `score`."""
    works: Sequence[Work]


@dataclass(frozen=True)
class RoundSummary:
    """Counts and figures of a finished round."""

    micro_batches: int
    """How many global ones the round trains on; those of whole optimiser steps."""
    summary: dict[str, float] = field(default_factory=dict)
    """Figures for the log: counts, mean and spread of scores, shares."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Unusable samples, by reason."""
    sentence: str = ""
    """The figures in words."""


class AbstractPreview(abc.ABC):
    """The same prompts, sampled by every round's policy, for people to look at."""

    @abc.abstractmethod
    def add(self, number: int, model: Any, *, last: bool = False) -> None:
        """Sample what the policy at the start of round `number` makes of them.

        Args:
            number: of the round; of the one that would follow, when the run is over.
            model: with that policy.
            last: sample it whatever its number.
        """

    @abc.abstractmethod
    def forget(self) -> None:
        """Remove what an earlier run left in the same folder."""


class AbstractCollector(abc.ABC):
    """The phases of a round, and the batches that it trains on.

    `rollouts.rounds.Rounds` decides when each is run, and survives being killed.

    Every method gives the same on every rank, and after being killed and started again.
    """

    @abc.abstractmethod
    def phases(self, number: int) -> Iterator[Phase]:
        """The phases of round `number`, in order; one is asked for when the one before is done."""

    def warm_up(self, model: Any) -> None:
        """Raise an error for whatever would otherwise fail only when much has been sampled."""
        return

    @abc.abstractmethod
    def summarise_round(self, number: int, folder: Path) -> RoundSummary:
        """Form the pairs of a round whose phases are done, and leave a grid of them.

        Called on the main rank alone; what it writes into `folder` the others read.
        """

    @abc.abstractmethod
    def batches(self, number: int, folder: Path, samples: int) -> Iterator[Any]:
        """This rank's parts of a built round, one a forward pass, behind so many `samples` of it
        that all ranks have seen."""

    def preview(self, folder: Path, run_seed: int) -> AbstractPreview | None:
        """What shows the policy of every round in `folder`; None for nothing."""
        return None

    def captions(self, n: int) -> list[str]:
        """At most `n` of the captions of images to come; none where there are no images."""
        return []

    @abc.abstractmethod
    def describe(self) -> list[str]:
        """Lines for the start of a run."""

    def describe_end(self) -> list[str]:
        """Lines for the end of a run, of what only the collector knows."""
        return []

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Identifies what is read (prompts, files), wherever it lies; the same on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Further parts of the position in a round, of plain JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        return

    def release(self, folder: Path) -> None:
        """Delete what only training on the round in `folder` needed; images and scores stay."""
        return
