"""Probabilities of the word that a vision-language model's response would begin with.

They are read off the model, so that nothing is sampled. A model of this machine is any that
diffalign loads; one behind an endpoint must tell log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from diffalign import components
from diffalign.console import silence_libraries
from diffalign.endpoints import Content
from diffalign.errors import ModelError
from diffalign.imaging.image_files import whole_uri
from diffalign.judges.endpoint import Endpoint
from diffalign.models.devices import DTYPES
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.models.vlm.processor import question_prompt
from diffalign.ranges import AtLeast, Ranged

Question = tuple[Sequence[Image.Image], str]
"""RGB images, and what is asked about them."""


def _is(token: str, word: str) -> bool:
    """Whether a token spells a word, whatever its case and the space before it."""
    return token.strip().casefold() == word


@dataclass(frozen=True, kw_only=True)
class FirstTokens(Ranged):
    """Who is asked, and how: settings that all who ask share."""

    section: ClassVar[str] = "scorer"
    """Where a config has these settings, for messages."""

    model: VLM | None = None
    """The judge, on this machine: `model.path=Qwen/Qwen2.5-VL-7B-Instruct` and the other settings
    of a vision-language model."""
    endpoint: Endpoint | None = None
    """In place of `model`, one behind an address: `endpoint.address=`, `.model=`. Images are sent
    as PNG files."""
    images_per_batch: Annotated[int, AtLeast(1)] = 8
    """Images in one pass of a model of this machine."""
    dtype: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """In which a model of this machine computes; auto is bf16 on a GPU and float32 elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.endpoint is None):
            raise ValueError(
                f"{components.kind_of(self)} asks a model of this machine "
                f"({self.section}.model.path=FOLDER) or one behind an address "
                f"({self.section}.endpoint.address=URL {self.section}.endpoint.model=NAME): give "
                f"one of them"
            )

    @property
    def asked(self) -> list[str]:
        """Parts of a fingerprint: who is asked."""
        if self.model is not None:
            return [self.model.policy_fingerprint(), self.dtype]
        assert self.endpoint is not None, "by __post_init__"
        return [self.endpoint.name]

    def chances(self, questions: Sequence[Question], words: Sequence[str]) -> Tensor:
        """Probabilities that the response to each of n questions begins with each of k words.

        Args:
            questions: all about the same number of images.
            words: in lower case, each in any spelling that is one token.

        Returns:
            Shape [n, k], float32. An endpoint tells of its most probable tokens alone: of others
            the probability is 0.

        Raises:
            ModelError: the model cannot be loaded, or its tokenizer spells a word with many tokens.
            ValueError: the endpoint refuses an image, or tells of none of the words.
            EndpointError: the endpoint does not answer, or tells no log-probabilities.
        """
        if self.endpoint is not None:
            return self._by_endpoint(self.endpoint, questions, words)
        size = max(1, self.images_per_batch // max(1, len(questions[0][0])))
        parts = [
            self._by_model(questions[start : start + size], words)
            for start in range(0, len(questions), size)
        ]
        return torch.cat(parts)

    def _by_model(self, questions: Sequence[Question], words: Sequence[str]) -> Tensor:
        model = self._loaded.get("model") or self.load(torch.device("cpu"))
        asked = [
            question_prompt(model.processor, text, images=len(images)) for images, text in questions
        ]
        chances = model.first_token_probabilities(asked, [images for images, _ in questions])
        return torch.stack([chances[:, self._tokens(model, w)].sum(dim=1) for w in words], dim=1)

    def place(self, device: torch.device | str) -> None:
        """Bring a model of this machine to a device; one behind an address stays where it is."""
        if self.model is not None:
            self.load(torch.device(device))

    def load(self, device: torch.device) -> VisionLanguageModel:
        """The model of this machine on a device; another one's is let go."""
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
        self, endpoint: Endpoint, questions: Sequence[Question], words: Sequence[str]
    ) -> Tensor:
        contents: list[Content] = [
            [
                *(
                    {"type": "image_url", "image_url": {"url": whole_uri(image)}}
                    for image in images
                ),
                {"type": "text", "text": text},
            ]
            for images, text in questions
        ]
        rows = []
        for told in endpoint.first_tokens(contents):
            row = [sum(math.exp(p) for t, p in told if _is(t, word)) for word in words]
            if not any(row):
                most = ", ".join(repr(token) for token, _ in told[:5]) or "nothing"
                raise ValueError(
                    f"the reply would begin with neither {' nor '.join(words)}, but with {most}"
                )
            rows.append(row)
        return torch.tensor(rows, dtype=torch.float32)
