"""A vision-language model as a scorer: the probability that it answers yes to a question.

The question names the prompt, such as whether the image shows it; the score is the probability that
a response begins with yes, in any spelling that is one token.

Source: Lin et al. 2024, arXiv:2404.01291 (VQAScore), whose question is the default.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from diffalign.judges.first_tokens import FirstTokens
from diffalign.scorers.images import AbstractImageScorer

YES, NO = "yes", "no"
_PLACE = "{prompt}"


@dataclass(frozen=True, kw_only=True)
class VLMYes(FirstTokens, AbstractImageScorer):
    """Probability of yes to a question about image and prompt, 0 to 1."""

    question: str = 'Does this figure show "{prompt}"? Please answer yes or no.'
    """What is asked, with the prompt in place of {prompt}."""
    relative: bool = False
    """Divide by the probability of yes and no together: for models that tend to begin otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if _PLACE not in self.question:
            raise ValueError(f"question must hold {_PLACE}, the place of the prompt")

    @cached_property
    def fingerprint(self) -> str:
        asked = repr((self.question, self.relative)).encode()
        digest = hashlib.blake2b(asked, digest_size=4).hexdigest()
        return "-".join(["vlm_yes", *self.asked, digest])

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Probabilities of yes.

        Raises:
            ModelError, ValueError, EndpointError: see `FirstTokens.chances`.
        """
        questions = [self.question.replace(_PLACE, prompt) for prompt in prompts]
        asked = [([image], text) for image, text in zip(images, questions, strict=True)]
        yes, no = self.chances(asked, [YES, NO]).unbind(dim=1)
        return yes / (yes + no) if self.relative else yes

    def to(self, device: torch.device | str) -> VLMYes:
        self.place(device)
        return self
