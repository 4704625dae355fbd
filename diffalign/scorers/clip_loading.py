"""What every judge built on transformers' CLIP shares: weights, tokens, features, pixel values.

Works with transformers 4 and 5, whose `get_image_features` return different things.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer

from diffalign.errors import ModelError

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images in [0, 1], per RGB channel: OpenAI's, which LAION's models share."""

_SHOWN = 3
"""How many names of misfitting weights an error lists."""


def read_clip(source: str, *, revision: str | None = None, field: str = "clip") -> CLIPModel:
    """A CLIP in float32 on the CPU, in evaluation mode, from safetensors alone.

    Args:
        source: a folder that `save_pretrained` wrote, or a hub id.
        revision: branch, tag or commit of a hub id.
        field: the setting that names `source`, for errors.

    Raises:
        ModelError: it cannot be read, or does not hold all weights of its own configuration.
    """
    try:
        clip, report = CLIPModel.from_pretrained(
            source, revision=revision or "main", use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{field}: cannot read a CLIP from {source}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{field}: {source} lacks weights of a CLIP: {_names(missing)}")
    return clip.float().eval()


def read_tokenizer(
    source: str, *, revision: str | None = None, field: str = "clip"
) -> CLIPTokenizer:
    """The tokenizer beside a CLIP.

    Raises:
        ModelError: there is none.
    """
    try:
        return CLIPTokenizer.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{field}: cannot read a CLIP tokenizer from {source}: {error}") from error


def tokenize(tokenizer: Any, prompts: Sequence[str], *, length: int) -> Tensor:
    """Token ids, padded and cut to `length`; int64 [n, length].

    What stands behind the end-of-text token does not matter: attention is causal, and CLIP pools
    at that token.
    """
    ids: Tensor = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    ).input_ids
    return ids


def text_features(clip: CLIPModel, tokens: Tensor) -> Tensor:
    """Projected features of texts, not normalised, [n, projection]."""
    features: Tensor = clip.text_projection(clip.text_model(input_ids=tokens).pooler_output)
    return features


def image_features(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """Projected features of pixel values, not normalised, [n, projection]."""
    features: Tensor = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    return features


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of the angle between rows of two [n, d], float32 [n] whatever they are."""
    return (normalize(first.float(), dim=-1) * normalize(second.float(), dim=-1)).sum(dim=-1)


def pixel_values(images: Tensor) -> Tensor:
    """CLIP's normalisation of float32 images in [-1, 1], already cut to the tower's size."""
    mean = images.new_tensor(PIXEL_MEAN)[:, None, None]
    std = images.new_tensor(PIXEL_STD)[:, None, None]
    return ((images + 1) / 2 - mean) / std


def fill(module: nn.Module, state: Mapping[str, Tensor], *, source: Path | str) -> None:
    """Give a module all its weights, and refuse a checkpoint that does not fit it.

    Names that transformers once stored and no longer does (`position_ids`) may be there or not.

    Args:
        module: keeps its dtype and device.
        state: weights by name.
        source: where they come from, for errors.

    Raises:
        ModelError: weights are missing, superfluous or of another shape; the first few are named.
    """
    own = {name: value for name, value in module.state_dict().items() if not _is_position(name)}
    given = {name: value for name, value in state.items() if not _is_position(name)}
    if missing := sorted(own.keys() - given.keys()):
        raise ModelError(f"{source} lacks weights of this network: {_names(missing)}")
    if unknown := sorted(given.keys() - own.keys()):
        raise ModelError(f"{source} holds weights that this network has not: {_names(unknown)}")
    misfits = [
        f"{name} {tuple(given[name].shape)} there and {tuple(value.shape)} here"
        for name, value in own.items()
        if given[name].shape != value.shape
    ]
    if misfits:
        raise ModelError(f"{source} is of another size than this network: {_names(misfits)}")
    module.load_state_dict({**module.state_dict(), **given})


def _is_position(name: str) -> bool:
    return name.endswith(".position_ids")


def _names(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
