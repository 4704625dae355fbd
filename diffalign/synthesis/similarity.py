"""How alike two responses are, or two images: the cosine of their embeddings.

For responses, papers take a network that was trained for it. Where the package for it is missing
there is a substitute, which is named in every row that it judged: its cosines are on another scale.
Images are compared by the vision tower of a model.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffalign.data.decoding import EncodedImage
from diffalign.errors import ConfigError, DataError, ModelError
from diffalign.files import open_tensors, replacing_file, writing
from diffalign.generation.writing import Writer
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.processes import only_writer

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
        """The kind that auto is on this machine."""
        if self.kind != "auto":
            return self.kind
        found = importlib.util.find_spec("sentence_transformers") is not None
        return "sentence_transformers" if found else "language_model"

    @property
    def name(self) -> str:
        """Name of the network that compares, as rows have it."""
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


Pooling = Literal["mean", "cls"]


def nearest(directions: Tensor, number: int, *, k: int) -> list[int]:
    """The images most similar to one of them, by cosine; exact.

    Args:
        directions: [m, width], one an image, each of length 1.
        number: of the image that is asked about; it is no neighbour of its own.
        k: how many neighbours are wanted; all of them, where there are fewer.

    Returns:
        Numbers of images, the nearest first; of equally near ones the earlier first.
    """
    cosines = directions @ directions[number]
    cosines[number] = -torch.inf
    order: list[int] = cosines.sort(descending=True, stable=True).indices.tolist()
    return order[: min(k, len(order) - 1)]


def embed(model: VisionLanguageModel, images: Sequence[Image.Image], *, pooling: Pooling) -> Tensor:
    """Embed images by the vision tower, one vector each: float32 [n, width], on the CPU.

    Args:
        model: whose tower is frozen.
        images: RGB.
        pooling: mean over the patches, or the class token.

    Raises:
        ModelError: its tower cannot be run alone, or has no class token.
    """
    processed = model.processor.image_processor(list(images), return_tensors="pt")
    inputs = {name: value for name, value in processed.items() if isinstance(value, Tensor)}
    one_each = inputs["pixel_values"].dim() == 4 and len(inputs["pixel_values"]) == len(images)
    if len(images) > 1 and not one_each:  # tiles, or patches of all images in one row
        return torch.cat([embed(model, [image], pooling=pooling) for image in images])
    seen = model.look(inputs).features
    if not seen:
        raise ModelError(
            "the vision tower of this model cannot be run alone, so that images cannot be "
            "compared by it; use a family that is known in detail, with the tower frozen"
        )
    features = list(seen.values())[-1].float().cpu()
    class_tokens = int(getattr(model.processor, "num_additional_image_tokens", 0) or 0)
    if pooling == "cls":
        if not class_tokens or features.dim() != 3:
            raise ModelError(
                "pooling is cls, and the vision tower of this model has no class token: use mean"
            )
        return features[: len(images), 0]
    if features.dim() == 2:  # tokens of the only image
        return features.mean(dim=0, keepdim=True)
    return features[: len(images), class_tokens:].mean(dim=1)


def digest(image: EncodedImage) -> str:
    """The same for the same image under any name."""
    assert image is not None
    content = image if isinstance(image, bytes) else image.read_bytes()
    return hashlib.blake2b(content, digest_size=12).hexdigest()


_LONGEST_WAIT = 86400.0


def remembered(path: Path, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Any]:
    """Tensors from a file that was written under the same key; computed and written otherwise, by
    one of several processes while the others wait."""
    with only_writer(path.parent, of=path.name, patience=_LONGEST_WAIT):
        return _remembered(path, key, compute)


def _remembered(path: Path, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Any]:
    if path.is_file():
        with contextlib.suppress(DataError), open_tensors(path) as file:  # else computed again
            if (file.metadata() or {}).get("key") == key:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors = compute()
    with writing(path), replacing_file(path) as draft:
        save_file(tensors, draft, metadata={"key": key})
    return tensors
