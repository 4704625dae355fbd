"""Rounds of responses about images: their settings, and the rows that they train on.

Of every question that a round visits the policy writes a few responses, each from a seed of its
own, and rewards score them. What is trained on is for a kind of rollouts to say: rows of one
response with its advantage, or of two of which one is preferred.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from diffalign.config import MAY_CHANGE
from diffalign.data.batches import TokenBatch
from diffalign.data.responses.questions import Question, QuestionConfig
from diffalign.ranges import AtLeast, MoreThan
from diffalign.rewards.base import AbstractReward
from diffalign.rollouts.base import AbstractRollouts
from diffalign.rollouts.scoring import component_name, numbered

SAMPLED = "sampled"
"""The view of a response that is a row by itself."""


@dataclass(frozen=True, kw_only=True)
class ScoredResponses:
    """The responses to one question of a round: a line of `responses.jsonl`."""

    visit: int
    """Number of the question's visit in the round."""
    question_id: str
    question: str
    """The user's last turn."""
    response: str | None = None
    """That of the data set."""
    texts: tuple[str, ...]
    """k of them; none where they were not sampled."""
    rewards: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    """By reward, of each response; None where it has none."""
    watched: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    """The same by rewards that nothing is trained on."""
    tokens: tuple[int, ...] = ()
    """How many each response has, the one that ends it included."""
    unfinished: int = 0
    """How many did not end by themselves."""
    unusable: str | None = None
    """Why nothing was sampled or scored; None if it was."""

    def vector(self, names: Sequence[str]) -> list[list[float]]:
        """Rewards of some names, [R][k], NaN where there is none."""
        return [
            [math.nan if value is None else value for value in self.rewards[name]] for name in names
        ]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one sample of a batch is made of."""

    sample_id: str
    visit: int
    responses: Mapping[str, int | None]
    """View -> the place of a sampled response; None for that of the data set of this name."""
    advantage: float | None = None
    preference: float | None = None
    target: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a round trains on, and what to say of it."""

    rows: Sequence[Row]
    figures: Mapping[str, float] = field(default_factory=dict)
    """For the log."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Questions that give no row, by reason."""
    sentence: str = ""
    """The figures in words."""


@dataclass(frozen=True, kw_only=True)
class AbstractResponseRollouts(AbstractRollouts):
    """Rounds of responses to questions about images."""

    makes: ClassVar[Literal["images", "responses"]] = "responses"
    batch_type: ClassVar[type] = TokenBatch

    questions: QuestionConfig
    """The questions; rounds walk through all of them."""
    rewards: tuple[AbstractReward, ...]
    """What scores responses."""
    reward_weights: tuple[float, ...] = ()
    """How much each of several rewards counts; empty counts all alike."""
    watch: tuple[AbstractReward, ...] = field(default=(), metadata=MAY_CHANGE)
    """Further rewards, which nothing is trained on."""
    questions_per_round: Annotated[int, AtLeast(1)]
    """Questions that a round visits, over all processes."""
    questions_per_batch: Annotated[int, AtLeast(1)] = 8
    """Questions whose responses are sampled at once on one device; memory grows with their product
    with `responses_per_question`."""
    responses_per_question: Annotated[int, AtLeast(1)] = 8
    """Responses sampled of each question; 8 as in TRL's GRPO."""
    temperature: Annotated[float, MoreThan(0, "responses would all be the same")] = 1.0
    """At which they are sampled, from all tokens."""
    max_new_tokens: Annotated[int, AtLeast(1)] = 256
    """A response ends there at the latest; 256 as in TRL's GRPO."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} numbers, and there are "
                f"{len(self.rewards)} rewards: give one for each, or leave it out"
            )

    def refuse_no_comparison(self) -> None:
        """Raise ValueError where a response is compared with no other by a reward."""
        if not self.rewards:
            raise ValueError("rewards is empty: name at least one, such as kind: yes_no")
        if self.responses_per_question < 2:
            raise ValueError(
                "responses_per_question is 1, and one response has none to be compared with: set "
                "it to 2 or more"
            )

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the rewards."""
        return self.reward_weights or (1.0,) * len(self.rewards)

    @property
    def reward_names(self) -> list[str]:
        """In the order of the config."""
        return numbered([component_name(reward) for reward in self.rewards])

    def samples_at(self, seed: int) -> int:
        """How many responses are sampled at a visit.

        Args:
            seed: of the visit.
        """
        return self.responses_per_question

    def data_responses_at(self, seed: int) -> tuple[str, ...]:
        """Views of a visit that show responses of the data set: `chosen`, `rejected`.

        Args:
            seed: of the visit.
        """
        return ()

    def remembers(self, samples_per_step: int) -> bool:
        """Whether the log-probabilities of sampled tokens, as they were, are kept for training.

        Args:
            samples_per_step: rows of an optimiser step.
        """
        return False

    @abc.abstractmethod
    def rows(self, groups: Sequence[ScoredResponses], seed: int) -> Rows:
        """What is trained on of a round.

        Args:
            groups: those that can be used, in order.
            seed: of the round.
        """

    def further_lines(self, samples_per_step: int) -> list[str]:
        """Lines for the start of a run that one kind alone has."""
        return []

    def obstacle(self, question: Question) -> str | None:
        """Why nothing can be learnt from a question, as half a sentence; None if something can."""
        return None

    def describe(self) -> str:
        rewards = " and ".join(self.reward_names)
        return (
            f"rounds of {self.questions_per_round} questions x {self.responses_per_question} "
            f"responses, scored by {rewards}"
        )
