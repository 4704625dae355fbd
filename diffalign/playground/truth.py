"""The truth as a reward: what the policy says of a playground image, held against the image.

The objects are read off the pixels by the oracle, so that any question of the playground about any
of its images can be scored, and nothing has to be written down before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

from diffalign.data.decoding import EncodedImage, decode
from diffalign.data.responses.questions import Question
from diffalign.playground.multi_object_scenes import kind_named, sentences_of
from diffalign.playground.oracle import read_objects
from diffalign.playground.questions import DESCRIBE, existence_question
from diffalign.playground.scenes import KINDS, Kind
from diffalign.ranges import AtLeast
from diffalign.response_rules.mentions import truthfulness
from diffalign.response_rules.yes_no import says
from diffalign.rewards.base import AbstractReward

_ASKED = {existence_question(kind): kind for kind in KINDS}


@dataclass(frozen=True, kw_only=True)
class PlaygroundTruth(AbstractReward):
    """Of yes-or-no questions 1 for the right response and 0 for any other; of descriptions how
    truthful and complete they are, where naming an object twice is wrong."""

    recall: Annotated[float, AtLeast(0)] = 1.0
    """How much completeness counts in descriptions, next to truth."""

    @property
    def fingerprint(self) -> str:
        return "playground-truth-1"

    def obstacle(self, question: Question) -> str | None:
        if len(question.images) != 1:
            return f"it is about {len(question.images)} images"
        if question.text != DESCRIBE and question.text not in _ASKED:
            return f"it is no question of the playground: {question.text!r}"
        return None

    def score(self, question: Question, responses: Sequence[str]) -> list[float]:
        present = _present(question.images[0])
        asked = _ASKED.get(question.text)
        if asked is not None:
            right = "yes" if asked in present else "no"
            return [float(says(response) == right) for response in responses]
        return [self._truthful(response, present) for response in responses]

    def _truthful(self, response: str, present: frozenset[Kind]) -> float:
        """A sentence that names no object counts like one that names what is not there."""
        named = [str(kind_named(text) or text) for text in sentences_of(response)]
        truth = frozenset(map(str, present))
        return truthfulness(named, truth, recall=self.recall, repeated="wrong")


@lru_cache(maxsize=256)
def _present(image: EncodedImage) -> frozenset[Kind]:
    return frozenset(seen.kind for seen in read_objects(decode(image)))
