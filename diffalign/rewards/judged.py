"""Win rates by a vision-language model that sees the image and two responses at a time.

Every two responses are shown in both orders, since who is shown two things leans to a place; the
probability is that of the word 1 against 2, read off the model, so that nothing is sampled. A
question takes k (k - 1) questions of the judge for k different responses.

Sources: Zheng et al. 2023, arXiv:2306.05685, a language model as the judge of pairs; win rates of
sampled responses among each other are those of SPPO (Wu et al. 2024, arXiv:2405.00675).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.data.decoding import decode
from diffalign.data.responses.questions import Question
from diffalign.judges.first_tokens import FirstTokens
from diffalign.judges.first_tokens import Question as Asked
from diffalign.pair_judges.base import BothOrders, every_pair
from diffalign.rewards.base import AbstractWinRate, Match

_WORDS = ("1", "2")
_PLACES = ("{question}", "{first}", "{second}")


@dataclass(frozen=True, kw_only=True)
class Judged(FirstTokens, AbstractWinRate):
    """How often a judge prefers a response to the others."""

    section: ClassVar[str] = "rollouts.rewards"

    template: str = (
        "{question}\n\nResponse 1: {first}\n\nResponse 2: {second}\n\nWhich response describes "
        "what is in the image more truthfully and is more helpful, 1 or 2? Answer with the number "
        "alone."
    )
    """What is asked below the image, with the question and both responses in their places. The
    judge replies 1 or 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [place for place in _PLACES if place not in self.template]
        if missing:
            raise ValueError(f"template must hold {' and '.join(missing)}")

    def check(self) -> None:
        if self.model is not None:
            self.model.check()
        if self.endpoint is not None:
            self.endpoint.check()

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(self.template.encode(), digest_size=4).hexdigest()
        return "-".join(["judged", *self.asked, digest])

    def to(self, device: torch.device) -> None:
        self.place(device)

    def preferences(self, question: Question, responses: Sequence[str]) -> Mapping[Match, float]:
        """Of every two responses, the mean of both orders.

        Raises:
            ModelError, EndpointError: see `FirstTokens.chances`.
        """
        images = [decode(image) for image in question.images]
        pairs = every_pair(len(responses))
        shown = [*pairs, *((j, i) for i, j in pairs)]
        asked: list[Asked] = [
            (images, self._filled(question.text, responses[one], responses[other]))
            for one, other in shown
        ]
        forward, backward = self._first_wins(asked).double().cpu().chunk(2)
        found = BothOrders(forward, backward).preference.tolist()
        return {
            pair: chance for pair, chance in zip(pairs, found, strict=True) if math.isfinite(chance)
        }

    def _first_wins(self, asked: Sequence[Asked]) -> Tensor:
        """Probabilities of 1 against 2, NaN where the judge would say neither."""
        try:
            chances = self.chances(asked, _WORDS)
        except ValueError:  # one of them cannot be judged: which?
            if len(asked) == 1:
                return torch.tensor([math.nan])
            return torch.cat([self._first_wins([one]) for one in asked])
        return chances[:, 0] / chances.sum(dim=1)

    def _filled(self, question: str, first: str, second: str) -> str:
        """The template, in whose values nothing is replaced."""
        values = dict(zip(_PLACES, (question, first, second), strict=True))
        return re.sub("|".join(map(re.escape, _PLACES)), lambda m: values[m[0]], self.template)
