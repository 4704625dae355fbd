"""Which images look alike to the vision tower of a model."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffalign.data.decoding import EncodedImage
from diffalign.errors import DataError, ModelError
from diffalign.files import open_tensors, replacing_file, writing
from diffalign.models.vlm.model import VisionLanguageModel

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
    """What the vision tower makes of images, one vector each: float32 [n, width], on the CPU.

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


def remembered(path: Path, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Any]:
    """Tensors from a file that was written under the same key; computed and written otherwise."""
    if path.is_file():
        with contextlib.suppress(DataError), open_tensors(path) as file:  # else computed again
            if (file.metadata() or {}).get("key") == key:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors = compute()
    with writing(path), replacing_file(path) as draft:
        save_file(tensors, draft, metadata={"key": key})
    return tensors
