"""Where batches come from: the contract of a source, and what sources of a data set share."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from PIL.Image import Image

from diffalign.data.held_out import HeldOut
from diffalign.data.loader import PlannedBatches
from diffalign.data.responses.records import Turn
from diffalign.errors import ConfigError


class FixedSamples(Protocol):
    """Samples that are the same at every visit, by number."""

    def __len__(self) -> int:
        """How many there are."""

    def sweep(self, visits: Sequence[tuple[int, int]]) -> Iterator[Any]:
        """Batches of them in this order as far as their images are of one size, on whatever rank;
        those that cannot be used are left out.

        Args:
            visits: the number of a sample, from 0 to `len(self) - 1`, and which visit of it.
        """


class AbstractSource(abc.ABC):
    """Batches for ever. The loop cannot tell whether they were read or just sampled."""

    batch_type: ClassVar[type]
    """What iteration yields."""
    views: frozenset[str]
    """Names of the views in every batch."""
    held_out: HeldOut[Any] | None = None
    """Pairs that iteration never yields, where the config holds some out."""

    @abc.abstractmethod
    def describe(self) -> list[str]:
        """Lines for the start of a run: what is read, how, and what is left out."""

    @abc.abstractmethod
    def describe_end(self) -> list[str]:
        """Lines for the end of a run: what was left out and what was skipped; none if nothing."""

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """This rank's batches from the current position on, without end."""

    def ahead(self, count: int) -> Iterator[Any]:
        """This rank's next batches, without leaving the current position; iterate anew afterwards.

        Raises:
            ConfigError: they cannot be known before their turn.
        """
        raise ConfigError("these samples are not known before their turn")

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position after the batches handed out so far, of plain JSON values; batches that
        workers hold ready do not count. It is the same on every rank, and all of them must call."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; iterate anew afterwards.

        Raises:
            DataError: the position belongs to another data set or another global batch.
        """

    def fingerprint(self) -> str:
        """What is read, wherever it lies; the same on every rank."""
        return ""

    def fixed_samples(self) -> FixedSamples:
        """Its samples in the order of the data set, for what is computed once for each of them.

        Raises:
            ConfigError: it has none of which a reference could be computed in advance.
        """
        raise ConfigError(
            "reference is cached, and these samples are not the same at every visit. Leave "
            "reference at auto"
        )

    def most_visits(self, micro_batches: int) -> int | None:
        """How often that sample is visited which is visited most, in so many micro-batches from the
        first one on; None where nobody knows."""
        return None

    def captions(self, n: int) -> list[str]:
        """At most `n` of the captions that will be met, from the first on; none where they are not
        those of images."""
        return []

    def conversations(self, n: int) -> list[tuple[Sequence[Turn], Sequence[Image]]]:
        """At most `n` of the conversations that responses of the data are to, each with its images;
        none where the data is no responses."""
        return []

    def bind(self, model: Any) -> None:
        """Take the loaded model, once, before iteration; sources that sample from it keep it."""
        return

    def release(self, state: Mapping[str, Any]) -> None:
        """No earlier position than `state` will be asked for again: its files may go."""
        return

    def figures(self) -> dict[str, float]:
        """What the log should say of the current batches, the same on every rank."""
        return {}

    def finish(self) -> None:
        """The last step is done, and its model is final."""
        return

    @property
    @abc.abstractmethod
    def skipped_counts(self) -> dict[str, int]:
        """Unusable samples met so far, by reason, over all ranks."""


Row = TypeVar("Row")
Sample = TypeVar("Sample")
Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True)
class Preview(Generic[Row]):
    """The part of a dry run that shows the data."""

    lines: list[str]
    """How the data is read, and what its rows are, as sentences."""
    rows: list[Row]
    """The first pairs."""


class OpenedData(Protocol):
    """A data set that a reader or a mapping has opened."""

    @property
    def summary(self) -> str:
        """What is read by what, and the mapping, as a sentence."""

    @property
    def fingerprint(self) -> str:
        """Another one for other data; the same wherever the data lies."""


class AbstractDataSource(AbstractSource, Generic[Sample, Batch]):
    """A data set in the order of a plan, for ever. Subclasses say what the batches become."""

    def __init__(self, data: OpenedData, batches: PlannedBatches[Sample, Batch]) -> None:
        """Take the parts.

        Args:
            data: for its summary and its fingerprint.
            batches: of its samples.
        """
        self._opened = data
        self._batches = batches

    def describe(self) -> list[str]:
        return [self._opened.summary, *self._batches.describe(), *self.further_lines()]

    def further_lines(self) -> list[str]:
        """Lines for the start of a run that one kind of data alone has."""
        return []

    def describe_end(self) -> list[str]:
        return self._batches.describe_end()

    def most_visits(self, micro_batches: int) -> int | None:
        return self._batches.most_visits(micro_batches)

    def fingerprint(self) -> str:
        """What is read, wherever it lies: by names and sizes of files and the number of pairs, or
        for the hub by id and revision. No image is read for it, and the same on every rank."""
        pairs = self._batches.known_pairs
        counted = "" if pairs is None else f", {pairs:,} pairs"
        return f"{self._opened.fingerprint}{counted}"

    @property
    def left_out_counts(self) -> dict[str, int]:
        """Rows without a preference, by reason; of a stream, those read so far."""
        return self._batches.left_out_counts

    @property
    def skipped_counts(self) -> dict[str, int]:
        return self._batches.skipped_counts

    def ahead(self, count: int) -> Iterator[Batch]:
        with self._batches.staying():
            yield from islice(self, count)

    def state_dict(self) -> dict[str, Any]:
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._batches.load_state_dict(state)
