"""The shared parts of scorers built on transformers' CLIP: weights, tokens, features, pixel values.

Works with transformers 4 and 5, whose `get_image_features` return different things.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from diffalign import hub
from diffalign.errors import ModelError
from diffalign.files import read_json, read_tensors
from diffalign.models.locations import PICKLES

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images in [0, 1], per RGB channel: OpenAI's, which LAION's models share."""

WEIGHTS = "model.safetensors"
"""Name of the weights in a folder."""

TOWER = "clip_vision_model"
"""The model_type of a vision tower that was saved without its CLIP."""

_HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+))?")
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
        with _hub_explained(source, field):
            loaded: Any = CLIPModel.from_pretrained(
                source, revision=revision or "main", use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{field}: cannot read a CLIP from {source}: {error}") from error
    clip, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{field}: {source} lacks weights of a CLIP: {_names(missing)}")
    model: CLIPModel = clip.float().eval()
    return model


def read_config(source: str, *, revision: str | None = None, field: str = "clip") -> CLIPConfig:
    """The architecture of a CLIP, without its weights.

    Raises:
        ModelError: there is none, or it is another model's.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        # transformers 5 would take the default configuration, of a CLIP that this is not
        raise ModelError(f"{field}: {source} holds no config.json of a CLIP")
    try:
        with _hub_explained(source, field):
            return CLIPConfig.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{field}: cannot read a CLIP's config.json at {source}: {error}"
        ) from error


def blank_clip(source: str, *, revision: str | None = None, field: str = "clip") -> CLIPModel:
    """A float32 CLIP of the same architecture on the CPU, whose weights are still to be filled in.

    Raises:
        ModelError: see `read_config`.
    """
    config = read_config(source, revision=revision, field=field)
    clip: CLIPModel = blank(lambda: CLIPModel(config))
    return clip


def blank_tower(source: str, *, field: str = "clip") -> CLIPVisionModelWithProjection:
    """The vision tower of a CLIP and its projection alone, as `blank_clip` makes the whole.

    Args:
        source: folder of a CLIP, or of a vision tower.
        field: the setting that names it, for errors.

    Raises:
        ModelError: see `read_config`.
    """
    if read_json(Path(source) / "config.json", error=ModelError).get("model_type") == TOWER:
        vision: Any = CLIPVisionConfig.from_pretrained(source)
    else:
        config = read_config(source, field=field)
        vision = config.vision_config
        vision.projection_dim = config.projection_dim
    tower: CLIPVisionModelWithProjection = blank(lambda: CLIPVisionModelWithProjection(vision))
    return tower


def blank(build: Callable[[], nn.Module]) -> Any:
    """A float32 network of transformers on the CPU, whose weights are still to be filled in.

    They are not even sampled: for a ViT-H that would take a minute, and it would disturb the global
    generator.

    Args:
        build: makes the network.
    """
    with torch.device("meta"):
        network = build().float()  # the configuration tells what it was stored in
    network.to_empty(device="cpu")
    for name, buffer in network.named_buffers():
        assert _is_position(name), name  # the one kind of tensor that no checkpoint brings
        buffer.copy_(torch.arange(buffer.shape[-1]))
    return network


def read_tokenizer(
    source: str, *, revision: str | None = None, field: str = "clip", kind: str = "CLIP"
) -> Any:
    """The tokenizer at a folder or hub id, next to a CLIP where it is one's.

    Raises:
        ModelError: there is none.
    """
    try:
        with _hub_explained(source, field):
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{field}: cannot read a {kind} tokenizer from {source}: {error}"
        ) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # transformers 5 makes one that knows no word where config.json lies alone
        raise ModelError(
            f"{field}: cannot read a {kind} tokenizer from {source}: it holds no words"
        )
    return tokenizer


def tokenize(tokenizer: Any, prompts: Sequence[str], *, length: int) -> Tensor:
    """Token ids, padded and cut to `length`; int64 [n, length].

    What is behind the end-of-text token does not matter: attention is causal, and CLIP pools
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


def tower_input(image: Image.Image, size: int) -> Tensor:
    """An image as the processor of the authors' transformers (4.27) hands it to CLIP.

    That one resizes with PIL. The processors that later versions choose resize tensors, and their
    pixels differ by a level here and there.

    Args:
        image: RGB, any shape.
        size: side of the vision tower's images, pixels.

    Returns:
        Normalised pixel values of the middle, float32 [3, size, size].
    """
    short, long = min(image.size), max(image.size)
    longer = int(size * long / short)
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    levels = np.array(resized.crop((left, top, left + size, top + size)), dtype=np.float32)
    return pixel_values(torch.from_numpy(levels).permute(2, 0, 1) / 127.5 - 1)


def find_weights(
    path: str, *, revision: str | None, allow_pickle: bool | None = None, name: str = WEIGHTS
) -> Path:
    """The one file of weights that a setting names, fetched if it lies on the hub.

    Args:
        path: a folder, a file, or `owner/name` on the hub, with or without `/file` behind it. Of a
            folder and of a bare hub id, `name` is taken.
        revision: branch, tag or commit of a hub id.
        allow_pickle: whether the file may be other than safetensors; None is no, where there is no
            setting of that name.
        name: of the file of weights; from the hub its configurations come along.

    Raises:
        ModelError: there is nothing of the kind, or it is a pickle and those are not allowed.
    """
    file = Path(path)
    if file.is_dir():
        file = file / name
    elif not file.exists():
        file = _fetch(path, revision, name, allow_pickle)
    if not file.is_file():
        found = ", ".join(sorted(entry.name for entry in file.parent.glob("*"))) or "nothing"
        raise ModelError(
            f"{path} holds no {name} (it holds: {found})"
            + (f". {_CONVERTED}" if any(map(_is_pickle, file.parent.glob("*"))) else "")
        )
    _refuse_pickle(path, file.name, allow_pickle)
    return file


def _is_pickle(file: Path) -> bool:
    return file.suffix in PICKLES


_CONVERTED = (
    "A pickled file of weights is converted once, as tensors alone, with\n"
    "  diffalign convert FILE output=NEW.safetensors"
)


def _refuse_pickle(path: str, name: str, allow_pickle: bool | None) -> None:
    if name.endswith(".safetensors") or allow_pickle:
        return
    new = Path(name).with_suffix(".safetensors")
    raise ModelError(
        f"{path} is not a .safetensors file but perhaps a pickle, which a trusting reader would "
        f"let run any code. Convert it once, with torch's reader of tensors and nothing else "
        f"(weights_only), and name the new file; prefer a source that you trust:\n"
        f"  diffalign convert {shlex.quote(path)} output={shlex.quote(str(new))}"
        + ("" if allow_pickle is None else "\nOr set allow_pickle, to be read so each time")
    )


def _fetch(path: str, revision: str | None, name: str, allow_pickle: bool | None) -> Path:
    match = _HUB_FILE.fullmatch(path)
    if match is None:
        raise ModelError(f"there is no file or folder {path}, and it is no hub id (owner/name)")
    if match[2]:
        _refuse_pickle(path, Path(match[2]).name, allow_pickle)
    try:
        with _hub_explained(match[1], "path"):
            if match[2]:
                return Path(hf_hub_download(match[1], match[2], revision=revision))
            patterns = [name, "*.json", "*.txt"]
            folder = snapshot_download(match[1], revision=revision, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise ModelError(f"there is no file or folder {path}, and the hub says: {error}") from error
    return Path(folder) / name


def _hub_explained(source: str, field: str) -> AbstractContextManager[None]:
    return hub.explained(source, kind="model", error=ModelError, field=field, section="scorer")


def digest_of(*files: Path) -> str:
    """Tells the content of files from any other; reads them whole.

    Raises:
        ModelError: one cannot be read.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        try:
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def digest_of_weights(module: nn.Module) -> str:
    """Tells the weights of a module, on the CPU, from any other."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_state(file: Path) -> dict[str, Tensor]:
    """Tensors by name: of a safetensors file, or of a pickle that holds nothing but tensors.

    Raises:
        ModelError: the file is damaged, or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            return read_tensors(file, error=ModelError)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises what its parts happen to raise
        raise ModelError(f"{file} cannot be read as weights: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{file} holds something other than tensors by name")
    return dict(state)


def renamed(
    state: Mapping[str, Tensor], names: Sequence[tuple[str, str]], *, unused: re.Pattern[str]
) -> dict[str, Tensor]:
    """Weights of a checkpoint by their names in a network; others keep theirs.

    Args:
        state: the weights by the names of the checkpoint.
        names: patterns of names there, and what takes their place, in turn.
        unused: whole names of weights that no score depends on, which are left out.
    """
    found = {}
    for name, value in state.items():
        if unused.fullmatch(name):
            continue
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        found[name] = value
    return found


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
    given = refuse_misfits(module, state, source=source)
    module.load_state_dict({**module.state_dict(), **given})


def refuse_misfits(
    module: nn.Module, state: Mapping[str, Tensor], *, source: Path | str
) -> dict[str, Tensor]:
    """The weights of a module, which may be on the meta device; see `fill` for what is refused."""
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
    return given


def _is_position(name: str) -> bool:
    return name.endswith(".position_ids")


def _names(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
