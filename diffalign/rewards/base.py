"""The contract of a reward of responses."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

from diffalign.data.responses.questions import Question
from diffalign.ranges import Ranged


@dataclass(frozen=True, kw_only=True)
class AbstractReward(Ranged, abc.ABC):
    """What says how good the responses to a question are; its fields are the settings of a config.

    A reward that is verified holds a response against the truth: of the data set, of a file, or of
    the image itself.
    """

    def check(self) -> None:
        """Raise ConfigError or DataError for what can be known to fail before weights are read."""
        return

    @property
    def fingerprint(self) -> str:
        """Identifies what it reads besides its settings, wherever that lies; may be empty."""
        return ""

    def obstacle(self, question: Question) -> str | None:
        """Why it cannot score responses to a question, as half a sentence; None if it can."""
        return None

    @abc.abstractmethod
    def score(self, question: Question, responses: Sequence[str]) -> list[float]:
        """One number for each of the responses to a question, NaN where it has none.

        Args:
            question: one to which there is no obstacle.
            responses: all that were sampled, so that they may be compared with each other.
        """
