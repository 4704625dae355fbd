"""The contract of a reward of responses."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from diffalign.data.responses.questions import Question
from diffalign.pair_judges.base import every_pair, win_rates
from diffalign.ranges import Ranged

Match = tuple[int, int]
"""Places of two responses to a question."""


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

    def to(self, device: torch.device) -> None:
        """Bring weights, if there are any, to where the policy is; called before it scores."""
        return

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


@dataclass(frozen=True, kw_only=True)
class AbstractWinRate(AbstractReward):
    """How often a response wins against the others to its question, 0 to 1: a reward that compares.

    The rate of a response is its mean probability of being preferred to each of the others of its
    group. Responses of the same text tie; each text is compared once.
    """

    @abc.abstractmethod
    def preferences(self, question: Question, responses: Sequence[str]) -> Mapping[Match, float]:
        """Probability that the first of two responses is preferred, of every two of them.

        Args:
            question: one to which there is no obstacle.
            responses: of different texts, two or more.

        Returns:
            For each of `every_pair`, without those that cannot be judged.
        """

    def score(self, question: Question, responses: Sequence[str]) -> list[float]:
        texts = list(dict.fromkeys(responses))
        found = self.preferences(question, texts) if len(texts) > 1 else {}
        places = [texts.index(text) for text in responses]
        played: list[Match] = []
        preferred: list[float] = []
        for i, j in every_pair(len(responses)):
            one, other = places[i], places[j]
            chance = 0.5 if one == other else found.get((min(one, other), max(one, other)))
            if chance is not None:
                played.append((i, j))
                preferred.append(chance if one <= other else 1 - chance)
        rates = win_rates(len(responses), played, preferred)
        return [math.nan if rate is None else rate for rate in rates]
