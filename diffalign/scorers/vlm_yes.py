"""A vision-language model as a scorer: the probability that it answers yes to a question.

The question names the prompt, such as whether the image shows it; the score is the probability that
a response begins with yes, in any spelling that is one token. It is read off the model, so that
nothing is sampled. A model of this machine is any that diffalign loads; one behind an endpoint must
tell log-probabilities.

Source: Lin et al. 2024, arXiv:2404.01291 (VQAScore), whose question is the default.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from torch import Tensor

from diffalign.console import silence_libraries
from diffalign.endpoints import Content
from diffalign.errors import ModelError
from diffalign.imaging.image_files import whole_uri
from diffalign.judges.endpoint import Endpoint
from diffalign.models.devices import DTYPES
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.models.vlm.processor import question_prompt
from diffalign.ranges import AtLeast
from diffalign.scorers.images import AbstractImageScorer

YES, NO = "yes", "no"
_PLACE = "{prompt}"


def _is(token: str, word: str) -> bool:
    """Whether a token spells a word, whatever its case and the space before it."""
    return token.strip().casefold() == word


@dataclass(frozen=True, kw_only=True)
class VLMYes(AbstractImageScorer):
    """Probability of yes to a question about image and prompt, 0 to 1."""

    model: VLM | None = None
    """The judge, on this machine: `scorer.model.path=Qwen/Qwen2.5-VL-7B-Instruct` and the other
    settings of a vision-language model."""
    endpoint: Endpoint | None = None
    """In place of `model`, one behind an address: `scorer.endpoint.address=`, `.model=`. Images are
    sent as PNG files."""
    question: str = 'Does this figure show "{prompt}"? Please answer yes or no.'
    """What is asked, with the prompt in place of {prompt}."""
    relative: bool = False
    """Divide by the probability of yes and no together: for models that tend to begin otherwise."""
    images_per_batch: Annotated[int, AtLeast(1)] = 8
    """Images in one pass of a model of this machine."""
    dtype: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """In which a model of this machine computes; auto is bf16 on a GPU and float32 elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.endpoint is None):
            raise ValueError(
                "the scorer vlm_yes asks a model of this machine (scorer.model.path=FOLDER) or one "
                "behind an address (scorer.endpoint.address=URL scorer.endpoint.model=NAME): give "
                "one of them"
            )
        if _PLACE not in self.question:
            raise ValueError(f"question must hold {_PLACE}, the place of the prompt")

    @cached_property
    def fingerprint(self) -> str:
        if self.model is not None:
            judge = [self.model.policy_fingerprint(), self.dtype]
        else:
            assert self.endpoint is not None, "by __post_init__"
            judge = [self.endpoint.name]
        asked = repr((self.question, self.relative)).encode()
        digest = hashlib.blake2b(asked, digest_size=4).hexdigest()
        return "-".join(["vlm_yes", *judge, digest])

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Probabilities of yes.

        Raises:
            ModelError: the model cannot be loaded, or its tokenizer spells yes with many tokens.
            ValueError: the endpoint refuses an image, or tells of neither yes nor no.
            EndpointError: the endpoint does not answer, or tells no log-probabilities.
        """
        questions = [self.question.replace(_PLACE, prompt) for prompt in prompts]
        if self.endpoint is not None:
            yes, no = self._by_endpoint(self.endpoint, images, questions)
        else:
            parts = [
                self._by_model(images[i : i + self.images_per_batch], questions[i:])
                for i in range(0, len(images), self.images_per_batch)
            ]
            yes, no = (torch.cat(some) for some in zip(*parts, strict=True))
        return yes / (yes + no) if self.relative else yes

    def to(self, device: torch.device | str) -> VLMYes:
        if self.model is not None:
            self._load(torch.device(device))
        return self

    def _by_model(
        self, images: Sequence[Image.Image], questions: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        model = self._loaded.get("model") or self._load(torch.device("cpu"))
        asked = [question_prompt(model.processor, text) for text in questions[: len(images)]]
        probabilities = model.first_token_probabilities(asked, [[image] for image in images])
        yes, no = (probabilities[:, self._tokens(model, word)].sum(dim=1) for word in (YES, NO))
        return yes, no

    def _load(self, device: torch.device) -> VisionLanguageModel:
        """The model on a device; another one's is let go."""
        found = self._loaded.get("model")
        if found is not None and found.device == device:
            return found
        self._loaded.clear()
        assert self.model is not None
        usual: Literal["bf16", "float32"] = "bf16" if device.type == "cuda" else "float32"
        dtype = usual if self.dtype == "auto" else self.dtype
        self.model.check()
        silence_libraries()
        self._loaded["model"] = self.model.load(
            device=device, compute_dtype=DTYPES[dtype], reference="none", trainable=False
        )
        return self._loaded["model"]

    def _tokens(self, model: VisionLanguageModel, word: str) -> list[int]:
        """Rows of the vocabulary that spell a word."""
        if word not in self._spelled:
            tokenizer: Any = model.processor.tokenizer
            texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
            self._spelled[word] = [i for i, text in enumerate(texts) if _is(text, word)]
        if not self._spelled[word]:
            assert self.model is not None
            raise ModelError(
                f"model.path: {self.model.path} has no token for {word!r}, and the score is the "
                f"probability of one: take a model whose tokenizer has whole words"
            )
        return self._spelled[word]

    @cached_property
    def _loaded(self) -> dict[str, VisionLanguageModel]:
        return {}

    @cached_property
    def _spelled(self) -> dict[str, list[int]]:
        return {}

    def _by_endpoint(
        self, endpoint: Endpoint, images: Sequence[Image.Image], questions: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        contents: list[Content] = [
            [
                {"type": "image_url", "image_url": {"url": whole_uri(image)}},
                {"type": "text", "text": question},
            ]
            for image, question in zip(images, questions, strict=True)
        ]
        sums = []
        for told in endpoint.first_tokens(contents):
            words = [sum(math.exp(p) for t, p in told if _is(t, word)) for word in (YES, NO)]
            if not any(words):
                most = ", ".join(repr(token) for token, _ in told[:5]) or "nothing"
                raise ValueError(f"the reply would begin with neither yes nor no, but with {most}")
            sums.append(words)
        yes, no = torch.tensor(sums, dtype=torch.float32).unbind(dim=1)
        return yes, no
