"""A vision-language model that is shown two images and asked which of them is the better one.

The probability is that of the response 1 against that of 2, read off the model.

Source: Zheng et al. 2023, arXiv:2306.05685, a language model as the judge of pairs; of images as
candidates with probabilities in place of sampled verdicts, our reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from diffalign.judges.first_tokens import FirstTokens
from diffalign.pair_judges.base import AbstractPairJudge

_PLACE = "{prompt}"


@dataclass(frozen=True, kw_only=True)
class VLMPairJudge(FirstTokens, AbstractPairJudge):
    """Probability of the first answer against that of the second."""

    section: ClassVar[str] = "scorer.judge"

    question: str = (
        "Two images were made for the same prompt. Prompt: {prompt}\nWhich image shows the prompt "
        "better and looks better, image 1 or image 2? Answer with the number alone."
    )
    """What is asked below the two images, with the prompt in place of {prompt}."""
    answers: tuple[str, ...] = ("1", "2")
    """How a response begins that prefers the first image, and one that prefers the second."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if _PLACE not in self.question:
            raise ValueError(f"question must hold {_PLACE}, the place of the prompt")
        if len({*self.answers}) != 2 or len(self.answers) != 2:
            raise ValueError(f"answers are two, for either image, got {list(self.answers)}")
        if any(answer != answer.strip().casefold() or not answer for answer in self.answers):
            raise ValueError(
                f"answers are words in lower case, which stand for any case and for a space before "
                f"them, got {list(self.answers)}"
            )

    @cached_property
    def fingerprint(self) -> str:
        asked = repr((self.question, self.answers)).encode()
        digest = hashlib.blake2b(asked, digest_size=4).hexdigest()
        return "-".join(["vlm_pair", *self.asked, digest])

    def prefers(
        self, first: Sequence[Image.Image], second: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Tensor:
        """Probabilities of the first answer against the second.

        Raises:
            ModelError, ValueError, EndpointError: see `FirstTokens.chances`.
        """
        asked = [
            ([one, other], self.question.replace(_PLACE, prompt))
            for one, other, prompt in zip(first, second, prompts, strict=True)
        ]
        chances = self.chances(asked, list(self.answers))
        return chances[:, 0] / chances.sum(dim=1)

    def to(self, device: torch.device | str) -> VLMPairJudge:
        self.place(device)
        return self
