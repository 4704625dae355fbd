"""Errors in the user's vocabulary: where, what was given, what is allowed, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffalignError(Exception):
    """An error whose message is a sentence for the user; the command line prints it alone."""


class ConfigError(DiffalignError):
    """A setting is unknown, of the wrong type, missing, or contradicts another one."""

    def __init__(self, message: str, *, lacking: bool = False) -> None:
        """Args:
        message: the sentence.
        lacking: something that has no default was not given, so that an example of the whole
            command says more than the sentence; the command line adds one.
        """
        super().__init__(message)
        self.lacking = lacking


class DataError(DiffalignError):
    """A data set or a file of it cannot be used."""


class ModelError(DiffalignError):
    """A model folder or checkpoint is incomplete, unsafe, or of another architecture."""


class CheckpointError(DiffalignError):
    """A checkpoint cannot be written, is damaged, or belongs to another run."""


class TrainingError(DiffalignError):
    """A run stopped itself: too many bad steps in a row."""


class BusyError(DiffalignError):
    """Another process writes in the folder."""


class CacheError(DiffalignError):
    """Cached values were computed under other settings than this run's."""


class EndpointError(DiffalignError):
    """An endpoint that is asked over the network does not answer, or cannot be understood: no
    fault of what it was asked about."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        """Args:
        message: the sentence.
        status: of HTTP, of the last attempt; None where there was none.
        """
        super().__init__(message)
        self.status = status


def did_you_mean(
    given: str, allowed: Iterable[str], *, prefix: str = "", cutoff: float = 0.6
) -> str:
    """The end of a message about a name that is not known.

    Args:
        given: the name.
        allowed: those that are known.
        prefix: what the message puts in front of a name, such as the key that it is a part of.
        cutoff: how alike the two must be, from 0 to 1.

    Returns:
        ` Did you mean NAME?`, or nothing where none is alike.
    """
    name = nearest(given, allowed, cutoff=cutoff)
    return f" Did you mean {prefix}{name}?" if name is not None else ""


def nearest(given: str, allowed: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The allowed name that is most like the one given; None where none is alike."""
    found = difflib.get_close_matches(given, list(allowed), n=1, cutoff=cutoff)
    return found[0] if found else None
