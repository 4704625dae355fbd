"""Where batches come from: the contract of a source."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar


class AbstractSource(abc.ABC):
    """Batches for ever. The loop cannot tell whether they were read or just sampled."""

    batch_type: ClassVar[type]
    """What iteration yields."""
    views: frozenset[str]
    """Names of the views in every batch."""

    @abc.abstractmethod
    def describe(self) -> list[str]:
        """Lines for the start of a run: what is read, how, and what is left out."""

    @abc.abstractmethod
    def describe_end(self) -> list[str]:
        """Lines for the end of a run: what was left out and what was skipped; none if nothing."""

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """This rank's batches from the current position on, without end."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position after the batches handed out so far, of plain JSON values; batches that
        workers hold ready do not count. It is the same on every rank."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; iterate anew afterwards.

        Raises:
            DataError: the position belongs to another data set or another global batch.
        """

    def fingerprint(self) -> str:
        """What is read, wherever it lies; the same on every rank."""
        return ""

    def captions(self, n: int) -> list[str]:
        """At most `n` of the captions that will be met, from the first on; none where they are not
        those of images."""
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
