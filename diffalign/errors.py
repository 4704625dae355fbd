"""What went wrong, in the user's vocabulary: where, what was given, what is allowed, what to do."""

from __future__ import annotations


class DiffalignError(Exception):
    """An error whose message is a sentence for the user; the command line prints it alone."""


class ConfigError(DiffalignError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DataError(DiffalignError):
    """A data set or a file of it cannot be used."""


class ModelError(DiffalignError):
    """A model folder or checkpoint is incomplete, unsafe, or of another architecture."""


class CheckpointError(DiffalignError):
    """A checkpoint cannot be written, is damaged, or belongs to another run."""


class TrainingError(DiffalignError):
    """A run stopped itself: too many bad steps in a row."""


class CacheError(DiffalignError):
    """Cached values were computed under other settings than this run's."""
