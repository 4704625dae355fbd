"""Models as folders and hub repositories in the layout of diffusers, and what any location offers.

Only safetensors are read, unless a flag says otherwise: then also tensors, and nothing else, from
pickles.
"""

from __future__ import annotations

import abc
import hashlib
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from torch import nn

from diffalign import hub
from diffalign.errors import ModelError
from diffalign.files import read_json
from diffalign.models.weights import Stored, stored_in

ITSELF = "."
"""Names, as a component, the one network of a location that holds no pipeline around it."""

INDEX = "model_index.json"
NETWORK_FILE = "diffusion_pytorch_model"
"""What diffusers calls the weights of a network, without an ending."""
LONE_CONFIGS = ("unet/config.json", "config.json")
"""In the place of that in a release of a denoiser alone."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_BLOCK, _BLOCKS = 4096, 64


class AbstractLocation(abc.ABC):
    """Where configurations and weights are read from."""

    @property
    @abc.abstractmethod
    def origin(self) -> tuple[str, str | None]:
        """Path or hub id, and revision, of what other libraries open by themselves."""

    @abc.abstractmethod
    def read_json(self, name: str) -> dict[str, Any]:
        """A configuration of the model, for example `unet/config.json`.

        Raises:
            ModelError: it is missing, cannot be fetched, or is no JSON object.
        """

    def marks(self, *, prediction_type: str | None = None) -> dict[str, Any]:
        """The noise schedule as the weights themselves have it, in the words of a scheduler's
        configuration: `prediction_type`, `rescale_betas_zero_snr`; and `edm`, the name of a tensor
        that belongs to EDM's preconditioning. A single file may; in a folder the configuration
        says it.

        Args:
            prediction_type: decides, whatever they say.

        Raises:
            ModelError: they contradict one another.
        """
        return {} if prediction_type is None else {"prediction_type": prediction_type}

    @abc.abstractmethod
    def check_weights(self, component: str) -> None:
        """Raise ModelError if the weights of a component are known to be missing or pickled."""

    @abc.abstractmethod
    def load(self, pipeline: Any, **components: Any) -> Any:
        """Read weights in float32, on the CPU.

        Args:
            pipeline: a diffusers pipeline class, or that of the one network.
            components: taken as they are instead of being read, or other pipeline arguments.

        Returns:
            The assembled pipeline, or the network.
        """

    @abc.abstractmethod
    def stored(self, component: str, config: Mapping[str, Any]) -> dict[str, Stored] | None:
        """Where the tensors of a network of diffusers lie, by their names in it.

        Args:
            component: of a pipeline, or `ITSELF`.
            config: of the network, which the names in a single file depend on.

        Returns:
            None where they cannot be read one by one: pickles, and what a single file holds in
            another form.

        Raises:
            ModelError: files are missing or damaged, or cannot be fetched.
        """

    def load_text_encoder(self, name: str, model_class: Any, dtype: torch.dtype) -> Any | None:
        """A text encoder of a pipeline, on the CPU; None where only the pipeline can read it.

        Args:
            name: within the pipeline, such as `text_encoder_2`.
            model_class: of transformers.
            dtype: of its weights.

        Raises:
            ModelError: it is not there, or lacks weights.
        """
        return self.load_complete(model_class, subfolder=name, dtype=dtype)

    def load_complete(self, model_class: Any, **options: Any) -> Any:
        """Read a lone model of transformers, of which every weight has to be there.

        Args:
            model_class: of transformers.
            options: further arguments of its `from_pretrained`.

        Raises:
            ModelError: weights are missing; transformers would go on with random numbers in their
                place.
        """
        model, report = self.load(model_class, output_loading_info=True, **options)
        if missing := sorted(report["missing_keys"]):
            import transformers

            raise ModelError(
                f"{self} lacks {len(missing)} weights of a {type(model).__name__}, such as "
                f"{missing[0]}. A folder that transformers 5 wrote may call them by names that "
                f"transformers {transformers.__version__} does not know: open it with the version "
                f"that wrote it (transformers_version in its config.json)"
            )
        return model

    @abc.abstractmethod
    def tokenizer(self, name: str) -> Any:
        """One tokenizer of a pipeline, without its weights.

        Args:
            name: within the pipeline, such as `tokenizer_2`.

        Raises:
            ModelError: it is not there, or cannot be read.
        """

    @abc.abstractmethod
    def identity(self, component: str) -> str:
        """Tells the weights of a component from others without reading them all."""


@dataclass(frozen=True)
class Folder(AbstractLocation):
    """A folder in the layout that diffusers' `save_pretrained` writes."""

    path: Path
    variant: str | None = None
    allow_pickle: bool = False

    def __str__(self) -> str:
        return str(self.path)

    @property
    def origin(self) -> tuple[str, str | None]:
        return str(self.path), None

    def read_json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            found = ", ".join(sorted(entry.name for entry in self.path.iterdir())) or "nothing"
            lone = [self.path / inside for inside in LONE_CONFIGS if (self.path / inside).is_file()]
            if name == INDEX and lone:
                model_type = read_config(lone[0]).get("model_type")  # transformers' alone have one
                raise ModelError(
                    _no_images(self.path, model_type) if model_type else _lone(self.path)
                )
            raise ModelError(
                f"{self.path} has no {name} (it holds: {found}). A model folder is what diffusers' "
                f"save_pretrained writes: model_index.json, unet/, vae/, scheduler/, text encoders "
                f"and tokenizers"
            )
        return read_config(file)

    def check_weights(self, component: str) -> None:
        if self._weights(component) or self.allow_pickle:
            return
        folder = self.path / component
        files = sorted(file.name for file in folder.glob("*") if file.is_file())
        pickles = [name for name in files if name.endswith(PICKLES)]
        if pickles:
            raise ModelError(pickle_refusal(f"{folder} holds {', '.join(pickles)}"))
        wanted = f"*.{self.variant}.safetensors" if self.variant else "*.safetensors"
        raise ModelError(
            f"{folder} has no weights: there is no {wanted} in it "
            f"(it holds: {', '.join(files) or 'nothing'})"
        )

    def load(self, pipeline: Any, **components: Any) -> Any:
        return in_float32(
            pipeline.from_pretrained(
                self.path,
                variant=self.variant,
                use_safetensors=None if self.allow_pickle else True,
                local_files_only=True,
                **components,
            ),
            given=components,
        )

    def stored(self, component: str, config: Mapping[str, Any]) -> dict[str, Stored] | None:
        marker = "" if self.variant is None else f".{self.variant}"
        folder = self.path / component
        indices = (*folder.glob(f"*.safetensors.index{marker}.json"),)
        if indices:
            files = [folder / name for name in _shards(indices[0])]
        else:
            files = self._weights(component)
            alone = folder / f"{NETWORK_FILE}{marker}.safetensors"
            files = [alone] if alone in files else files
        return stored_in(files) if files else None

    def tokenizer(self, name: str) -> Any:
        return _tokenizer(self, name, self.path, local_files_only=True)

    def identity(self, component: str) -> str:
        files = self._weights(component) or sorted((self.path / component).glob("*.bin"))
        return "+".join(file_digest(file) for file in files)

    def _weights(self, component: str) -> list[Path]:
        marker = "" if self.variant is None else f".{self.variant}"
        pattern = re.compile(rf"[^.]+{re.escape(marker)}(-\d+-of-\d+)?\.safetensors")
        return sorted(
            file
            for file in (self.path / component).glob("*.safetensors")
            if pattern.fullmatch(file.name)
        )


@dataclass(frozen=True)
class Hub(AbstractLocation):
    """A repository of the Hugging Face hub in the same layout; files are cached once fetched."""

    name: str
    revision: str | None = None
    variant: str | None = None
    allow_pickle: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def origin(self) -> tuple[str, str | None]:
        return self.name, self.revision

    def read_json(self, name: str) -> dict[str, Any]:
        try:
            file = Path(name).as_posix()
            with self._explained():
                found = hf_hub_download(self.name, file, revision=self.revision)
            return read_config(Path(found))
        except (OSError, ValueError) as error:
            if name == INDEX and self._has(LONE_CONFIGS[0]):
                raise ModelError(_lone(self.name)) from error
            raise self._unreachable(name, error) from error

    def _has(self, file: str) -> bool:
        try:
            hf_hub_download(self.name, file, revision=self.revision)
        except (OSError, ValueError):
            return False
        return True

    def check_weights(self, component: str) -> None:
        """Nothing is known before the download, which asks for safetensors alone."""

    def load(self, pipeline: Any, **components: Any) -> Any:
        try:
            with self._explained():
                loaded = pipeline.from_pretrained(
                    self.name,
                    revision=self.revision,
                    variant=self.variant,
                    use_safetensors=None if self.allow_pickle else True,
                    **components,
                )
            return in_float32(loaded, given=components)
        except OSError as error:
            raise self._unreachable("safetensors weights", error) from error

    def stored(self, component: str, config: Mapping[str, Any]) -> dict[str, Stored] | None:
        """The files are fetched."""
        markers = [f".{self.variant}", ""] if self.variant else [""]
        problem: Exception | None = None
        for marker in markers:
            try:
                file = self._fetch(component, f"{NETWORK_FILE}{marker}.safetensors")
                return stored_in([file])
            except (OSError, ValueError) as error:
                problem = problem or error
            try:
                index = self._fetch(component, f"{NETWORK_FILE}.safetensors.index{marker}.json")
                return stored_in([self._fetch(component, name) for name in _shards(index)])
            except (OSError, ValueError):
                pass
        if self.allow_pickle:
            return None
        assert problem is not None
        raise self._unreachable(f"safetensors weights of {component}", problem) from problem

    def _fetch(self, component: str, name: str) -> Path:
        with self._explained():
            file = Path(component, name).as_posix()
            return Path(hf_hub_download(self.name, file, revision=self.revision))

    def tokenizer(self, name: str) -> Any:
        return _tokenizer(self, name, self.name, revision=self.revision)

    def identity(self, component: str) -> str:
        """The commit, where the cache knows it: a branch name may mean other weights tomorrow."""
        index = "config.json" if component == ITSELF else "model_index.json"
        cached = try_to_load_from_cache(self.name, index, revision=self.revision)
        commit = Path(cached).parent.name if isinstance(cached, str) else self.revision
        return f"{self.name}@{commit}/{component}/{self.variant}"

    def _explained(self) -> AbstractContextManager[None]:
        return hub.explained(self.name, kind="model", error=ModelError, field="the model")

    def _unreachable(self, what: str, error: Exception) -> ModelError:
        where = self.name + (f" at revision {self.revision}" if self.revision else "")
        said = str(error).strip()
        reason = said.splitlines()[0].rstrip(".") if said else type(error).__name__
        return ModelError(
            f"cannot get {what} of {where} from the hub: {reason}. If a local folder was meant, "
            f"there is no {Path(self.name).absolute()}; for a gated model log in with "
            f"`hf auth login`; without a network, give the path of a downloaded folder"
        )


def _lone(where: object) -> str:
    return (
        f"{where} has no {INDEX}: it holds a denoiser alone: give it as unet, and as path the "
        f"model that it was trained from, such as stabilityai/stable-diffusion-xl-base-1.0"
    )


def _no_images(where: object, model_type: object) -> str:
    return (
        f"{where} has no {INDEX}: it is a {model_type!s:.60} of transformers, which does not make "
        f"images. Vision-language models are trained as model.kind=vlm, and asked by diffalign "
        f"evaluate"
    )


def pickle_refusal(given: str) -> str:
    return (
        f"{given}: a pickle, which a trusting reader would let run any code. Convert it with "
        f"diffusers' save_pretrained(folder, safe_serialization=True), or set allow_pickle to "
        f"true: torch then reads tensors from it and nothing else (weights_only), which is safe as "
        f"far as torch has no hole there; prefer a source that you trust"
    )


def _shards(index: Path) -> list[str]:
    """Names of the files over which an index spreads the tensors of a network."""
    names = read_config(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index} names no files: its weight_map is {names!r:.60}")
    return sorted(set(map(str, names.values())))


def in_float32(loaded: Any, *, given: Mapping[str, Any] | None = None) -> Any:
    """A pipeline with all its networks in float32: transformers 5 keeps what type the file has.
    Those that were given to it are left as they are.

    Not by an argument of the load: its name depends on the version of diffusers. (A lone network of
    diffusers is always read in float32.) Tokenizers that know no length, or one beyond the
    positions of their encoder, are given that of the encoder.
    """
    parts = getattr(loaded, "components", {})
    for name, part in parts.items():
        if isinstance(part, nn.Module) and part is not (given or {}).get(name):
            part.float()
    for name, part in parts.items():
        encoder = parts.get(name.replace("tokenizer", "text_encoder"))
        if name.startswith("tokenizer") and part is not None and encoder is not None:
            limit = getattr(encoder.config, "max_position_embeddings", None)
            if limit is not None and part.model_max_length > limit:
                part.model_max_length = limit
    return loaded


def _tokenizer(location: AbstractLocation, name: str, source: Any, **options: Any) -> Any:
    """As a pipeline would load it, its length that of its encoder where it knows none."""
    import transformers

    kind = location.read_json("model_index.json").get(name) or (None, "")
    encoder = location.read_json(f"{name.replace('tokenizer', 'text_encoder')}/config.json")
    try:
        tokenizer_class = getattr(transformers, kind[1])
        tokenizer = tokenizer_class.from_pretrained(source, subfolder=name, **options)
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
        raise ModelError(f"{source}: {name} cannot be read: {error}") from error
    limit = encoder.get("max_position_embeddings")
    if isinstance(limit, int) and tokenizer.model_max_length > limit:
        tokenizer.model_max_length = limit
    return tokenizer


def read_config(file: Path) -> dict[str, Any]:
    content = read_json(file, error=ModelError)
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold a JSON object, and holds a {type(content).__name__}")
    return content


def file_digest(file: Path) -> str:
    """Of the size and 64 evenly spaced blocks: milliseconds for 10 GB, and no fine-tune of a model
    leaves all of these blocks as they were."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with file.open("rb") as stream:
        for block in range(_BLOCKS):
            stream.seek(max(size - _BLOCK, 0) * block // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()
