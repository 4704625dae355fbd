"""How alike two responses are: the cosine of their embeddings.

Papers take a network that was trained for it. Where the package for it is missing there is a
stand-in, which is named in every row that it judged: its cosines are on another scale.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.synthesis.writing import Writer

Similarity = Callable[[Sequence[str], Sequence[str]], Tensor]
"""Cosines of n pairs of texts, float32 [n]."""


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig:
    """By what responses are compared."""

    kind: Literal["auto", "sentence_transformers", "language_model"] = "auto"
    """sentence_transformers, as papers do; language_model takes the mean over tokens of the last
    hidden states of the model itself, needs nothing, and finds most texts alike: set a threshold
    for it. auto takes the first where its package is installed, and says what it took."""
    path: str = "sentence-transformers/all-mpnet-base-v2"
    """Folder or hub id of the network, for sentence_transformers. The default is that of BDHS."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    @property
    def chosen(self) -> Literal["sentence_transformers", "language_model"]:
        """What auto comes to on this machine."""
        if self.kind != "auto":
            return self.kind
        found = importlib.util.find_spec("sentence_transformers") is not None
        return "sentence_transformers" if found else "language_model"

    @property
    def name(self) -> str:
        """What compares, as it is in the rows."""
        if self.chosen == "language_model":
            return "mean hidden states of the language model"
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    def check(self) -> None:
        """Raise ConfigError where the package is asked for by name and missing."""
        if importlib.util.find_spec("sentence_transformers") is None and (
            self.chosen == "sentence_transformers"
        ):
            raise ConfigError(
                "similarity.kind is sentence_transformers, and the package is not installed: "
                "pip install 'diffalign[language]'; or do without it: language_model, whose "
                "cosines are on another scale than those of the papers"
            )

    def open(self, writer: Writer) -> Similarity:
        """Load what compares."""
        self.check()
        embed: Callable[[Sequence[str]], Tensor] = writer.hidden_states
        if self.chosen == "sentence_transformers":
            embed = _sentence_network(self.path, self.revision, writer)
        return lambda some, others: torch.cosine_similarity(embed(some), embed(others))


def _sentence_network(
    path: str, revision: str | None, writer: Writer
) -> Callable[[Sequence[str]], Tensor]:
    from sentence_transformers import SentenceTransformer

    network = SentenceTransformer(
        path,
        revision=revision,
        device=str(writer.model.device),
        model_kwargs={"use_safetensors": True},
    )
    return lambda texts: network.encode(
        list(texts), convert_to_tensor=True, show_progress_bar=False
    ).cpu()
