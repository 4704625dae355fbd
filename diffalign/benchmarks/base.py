"""What `diffalign evaluate` asks of a benchmark."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from pathlib import Path

from diffalign.benchmarks.report import Report
from diffalign.ranges import Ranged


@dataclass(frozen=True, kw_only=True)
class AbstractBenchmark(Ranged, abc.ABC):
    """Settings of one benchmark: where its files and the responses lie, and how it counts."""

    @property
    @abc.abstractmethod
    def saves(self) -> Path | None:
        """The file that takes one row a response; None where nobody asked for it."""

    @abc.abstractmethod
    def plan(self) -> str:
        """One line on what is about to be judged by what."""

    @abc.abstractmethod
    def report(self) -> Report:
        """Judge the responses.

        Raises:
            DataError: a file cannot be used.
            ConfigError: what the settings ask for is not installed.
        """
