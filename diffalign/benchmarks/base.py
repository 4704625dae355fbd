"""The contract of a benchmark, and what its figures are reported with."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.benchmarks.report import Report
from diffalign.generation.responses import Asked, Asking
from diffalign.intervals import Bootstrap
from diffalign.ranges import Ranged


@dataclass(frozen=True, kw_only=True)
class AbstractBenchmark(Ranged, abc.ABC):
    """Settings of one benchmark: where its files and the responses lie, and how it counts.

    A benchmark is a folder, benchmarks/NAME/: `config.py` holds the one concrete class, `rules.py`
    the published rules. The command line lists the folders, so nothing else names a benchmark.
    """

    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    """How intervals are made."""
    details: Path | None = None
    """JSON lines with what was found in each response; null writes none."""
    called: str = "first"
    """Name of this model in a table of several."""
    also: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further models for one table, each by its name with the settings in which it differs, such as
    `also.aligned.responses=FILE` or `also.aligned.model.lora.start=RUN`."""

    @property
    @abc.abstractmethod
    def kept(self) -> tuple[Path, ...]:
        """Files from which a rerun goes on: a model's responses, a judge's verdicts."""

    @property
    def written(self) -> frozenset[Path]:
        """Every file that a run adds to or replaces."""
        return frozenset(self.kept if self.details is None else (*self.kept, self.details))

    @abc.abstractmethod
    def plan(self) -> str:
        """One line for people: which responses are compared with what."""

    def asked(self) -> Asked | None:
        """What a model is asked, and how; None where nothing is.

        Raises:
            DataError: a file with questions cannot be used.
        """
        return None

    @property
    def asked_into(self) -> Path | None:
        """The file of responses where a model is asked."""
        asking = getattr(self, "asking", None)
        return asking.saves if isinstance(asking, Asking) else None

    def check_to_ask(self) -> None:
        """Raise ConfigError for what counting will need, before a model is asked for hours."""

    @abc.abstractmethod
    def report(self) -> Report:
        """Read or ask for the responses, and count.

        Raises:
            DataError: a file cannot be used.
            ConfigError: what the settings ask for is not installed.
        """
