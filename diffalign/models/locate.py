"""Where a model's weights come from: a diffusers folder, a hub id, or a single checkpoint file.

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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from diffalign import hub
from diffalign.errors import ModelError, did_you_mean
from diffalign.files import read_json
from diffalign.models.runs import (
    CONFIG,
    FINAL,
    RunCheckpoint,
    checkpoint_at,
    is_run,
    model_of_run,
)

ITSELF = "."
"""Names, as a component, the one network of a location that holds no pipeline around it."""

_INDEX = "model_index.json"
_LONE = ("unet/config.json", "config.json")
"""What a release of a denoiser alone has in the place of that."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
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
        """What the weights themselves say of their noise schedule, in the words of a scheduler's
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
            lone = [self.path / inside for inside in _LONE if (self.path / inside).is_file()]
            if name == _INDEX and lone:
                model_type = _parse(lone[0]).get("model_type")  # transformers' alone have one
                raise ModelError(
                    _no_images(self.path, model_type) if model_type else _lone(self.path)
                )
            raise ModelError(
                f"{self.path} has no {name} (it holds: {found}). A model folder is what diffusers' "
                f"save_pretrained writes: model_index.json, unet/, vae/, scheduler/, text encoders "
                f"and tokenizers"
            )
        return _parse(file)

    def check_weights(self, component: str) -> None:
        if self._weights(component) or self.allow_pickle:
            return
        folder = self.path / component
        files = sorted(file.name for file in folder.glob("*") if file.is_file())
        pickles = [name for name in files if name.endswith(_PICKLES)]
        if pickles:
            raise ModelError(_pickle_refusal(f"{folder} holds {', '.join(pickles)}"))
        wanted = f"*.{self.variant}.safetensors" if self.variant else "*.safetensors"
        raise ModelError(
            f"{folder} has no weights: there is no {wanted} in it "
            f"(it holds: {', '.join(files) or 'nothing'})"
        )

    def load(self, pipeline: Any, **components: Any) -> Any:
        return _ready(
            pipeline.from_pretrained(
                self.path,
                variant=self.variant,
                use_safetensors=None if self.allow_pickle else True,
                local_files_only=True,
                **components,
            )
        )

    def tokenizer(self, name: str) -> Any:
        return _tokenizer(self, name, self.path, local_files_only=True)

    def identity(self, component: str) -> str:
        files = self._weights(component) or sorted((self.path / component).glob("*.bin"))
        return "+".join(_digest(file) for file in files)

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
            return _parse(Path(found))
        except (OSError, ValueError) as error:
            if name == _INDEX and self._has(_LONE[0]):
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
            return _ready(loaded)
        except OSError as error:
            raise self._unreachable("safetensors weights", error) from error

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


@dataclass(frozen=True)
class SingleFile(AbstractLocation):
    """One checkpoint in the original layout; its configuration comes from elsewhere."""

    path: Path
    config: AbstractLocation
    """A model of the same architecture: configurations, tokenizers and schedule are read there."""

    def __str__(self) -> str:
        return str(self.path)

    @property
    def origin(self) -> tuple[str, str | None]:
        return str(self.path), None

    def read_json(self, name: str) -> dict[str, Any]:
        return self.config.read_json(name)

    def marks(self, *, prediction_type: str | None = None) -> dict[str, Any]:
        if self.path.suffix != ".safetensors":
            return super().marks(prediction_type=prediction_type)
        names, metadata = _header(self.path)
        marks: dict[str, Any] = {}
        kind = prediction_type or _predicted(self.path, names, metadata)
        if kind is not None:
            marks["prediction_type"] = kind
        if "ztsnr" in names or metadata.get("ss_zero_terminal_snr", "").lower() == "true":
            marks["rescale_betas_zero_snr"] = True
        edm = sorted(n for n in names if n.startswith(("edm_mean", "edm_std", "edm_vpred.")))
        return marks | ({"edm": edm[0]} if edm else {})

    def check_weights(self, component: str) -> None:
        """A single file holds all components; what else it lacks shows when it is read."""
        if component != "unet" or self.path.suffix != ".safetensors":
            return
        found = _input_channels(self.path)
        expected = self.read_json("unet/config.json").get("in_channels", 4)
        if found is not None and found != expected:
            raise ModelError(
                f"{self.path}: its network takes {found} channels, and that of {self.config} takes "
                f"{expected}: config is of another kind of model (9 are those of inpainting, 8 of "
                f"InstructPix2Pix)"
            )

    def load(self, pipeline: Any, **components: Any) -> Any:
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        config, _ = self.config.origin
        options: dict[str, Any] = {"local_files_only": isinstance(self.config, Folder)}
        if isinstance(self.config, Hub) and self.config.revision is not None:
            options["revision"] = self.config.revision
        try:
            return _ready(
                pipeline.from_single_file(str(self.path), config=config, **options, **components)
            )
        except SingleFileComponentError as error:
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"{self.path}: cannot be read as a {pipeline.__name__}: {reason}"
            ) from error

    def tokenizer(self, name: str) -> Any:
        return self.config.tokenizer(name)

    def load_network(self, network_class: Any, config: Mapping[str, Any]) -> Any:
        """The denoiser, where the file holds nothing else that is wanted.

        Args:
            network_class: of diffusers.
            config: of the network.
        """
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        with torch.device("meta"):
            network = network_class.from_config(dict(config))
        try:
            tensors = load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{self.path}: cannot be read: {error}") from error
        original = {k.removeprefix(_DENOISER): v for k, v in tensors.items()}
        if "input_blocks.0.0.weight" in original:
            tensors = convert_ldm_unet_checkpoint(
                {f"{_DENOISER}{name}": value for name, value in original.items()},
                dict(network.config),
            )
        try:
            network.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            first = str(error).splitlines()[1:2] or [str(error)]
            raise ModelError(
                f"{self.path}: does not hold the weights of the {network_class.__name__} of "
                f"{self.config}: {first[0].strip()[:300]}"
            ) from error
        return network.float().eval()

    def identity(self, component: str) -> str:
        return _digest(self.path)


@dataclass(frozen=True)
class WithCheckpoint(AbstractLocation):
    """The model that a run trained all weights of, as it was at a checkpoint."""

    checkpoint: RunCheckpoint
    base: AbstractLocation
    """What the run started from."""
    component: str
    """The network that it trained."""
    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None
    """What the run was told of its schedule."""

    def __str__(self) -> str:
        return str(self.checkpoint.folder)

    @property
    def origin(self) -> tuple[str, str | None]:
        return self.base.origin

    def read_json(self, name: str) -> dict[str, Any]:
        return self.base.read_json(name)

    def marks(self, *, prediction_type: str | None = None) -> dict[str, Any]:
        marks = self.base.marks(prediction_type=prediction_type or self.prediction_type)
        if self.zero_terminal_snr is not None:
            marks["rescale_betas_zero_snr"] = self.zero_terminal_snr
        return marks

    def check_weights(self, component: str) -> None:
        self.base.check_weights(component)

    def load(self, pipeline: Any, **components: Any) -> Any:
        loaded = self.base.load(pipeline, **components)
        if self.component in components:
            return loaded
        # transformers' own models may come with a report of the load next to them
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        network = model if self.component == ITSELF else getattr(model, self.component)
        parameters = dict(network.named_parameters())
        values = self.checkpoint.values()
        for name, value in values.items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise ModelError(
                    f"{self.checkpoint.file}: holds {name} of shape {list(value.shape)}, and "
                    f"{self.base} has no such weight: the run started from another model"
                )
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
        return loaded

    def tokenizer(self, name: str) -> Any:
        return self.base.tokenizer(name)

    def identity(self, component: str) -> str:
        own = component == self.component
        return _digest(self.checkpoint.file) if own else self.base.identity(component)


@dataclass(frozen=True)
class WithNetwork(AbstractLocation):
    """A model of which one network lies elsewhere, as authors of DPO methods release theirs."""

    base: AbstractLocation
    network: AbstractLocation
    """A folder or a hub id, or one file whose other configurations are the base's."""
    inside: str
    """Where in it the denoiser is: a folder's name, or `ITSELF`."""
    component: str = "unet"

    def __str__(self) -> str:
        return f"{self.base} with the {self.component} of {self.network}"

    @property
    def origin(self) -> tuple[str, str | None]:
        return self.base.origin

    def read_json(self, name: str) -> dict[str, Any]:
        own = f"{self.component}/"
        if not name.startswith(own):
            return self.base.read_json(name)
        return self.network.read_json(f"{self.inside}/{name.removeprefix(own)}")

    def marks(self, *, prediction_type: str | None = None) -> dict[str, Any]:
        return {
            **self.base.marks(prediction_type=prediction_type),
            **self.network.marks(prediction_type=prediction_type),
        }

    def check_weights(self, component: str) -> None:
        if component == self.component:
            self.network.check_weights(self.inside)
        else:
            self.base.check_weights(component)

    def load(self, pipeline: Any, **components: Any) -> Any:
        if self.component not in components:
            config = self.read_json(f"{self.component}/config.json")
            components[self.component] = self._read(config)
        return self.base.load(pipeline, **components)

    def _read(self, config: Mapping[str, Any]) -> Any:
        import diffusers  # takes seconds, and not every location is of an image generator

        network_class = getattr(diffusers, str(config.get("_class_name")))
        if isinstance(self.network, SingleFile):
            return self.network.load_network(network_class, config)
        inside = {} if self.inside == ITSELF else {"subfolder": self.inside}
        return self.network.load(network_class, **inside)

    def tokenizer(self, name: str) -> Any:
        return self.base.tokenizer(name)

    def identity(self, component: str) -> str:
        if component == self.component:
            return self.network.identity(self.inside)
        return self.base.identity(component)


def with_network(
    base: AbstractLocation, path: str, *, revision: str | None = None, variant: str | None = None
) -> WithNetwork:
    """A model with another denoiser in the place of its own.

    Args:
        base: the model.
        path: a folder or hub id that holds a denoiser, alone or in a folder `unet`, or a
            `.safetensors` file with one, in the original layout or that of diffusers.
        revision: branch, tag or commit of a hub id.
        variant: part of the weights' file names, such as `fp16`.

    Raises:
        ModelError: there is none.
    """
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix != ".safetensors":
            raise ModelError(f"unet: {path} is a file, but not a .safetensors checkpoint")
        return WithNetwork(base, SingleFile(local, base), "unet")
    try:
        network = locate(path, revision=revision, variant=variant)
        try:
            network.read_json("unet/config.json")
        except ModelError:
            network.read_json(f"{ITSELF}/config.json")
            return WithNetwork(base, network, ITSELF)
    except ModelError as error:
        raise ModelError(f"unet: {error}") from error
    return WithNetwork(base, network, "unet")


def locate(
    path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    allow_pickle: bool = False,
) -> AbstractLocation:
    """Decide what a path names, without reading weights.

    Args:
        path: a folder, a `.safetensors` file, or a hub id such as `owner/name`.
        revision: branch, tag or commit of a hub id.
        variant: part of the weights' file names, such as `fp16`.
        config: for a single file, a folder or hub id of the same architecture.
        allow_pickle: read pickled weights where there are no others.

    Raises:
        ModelError: nothing is there, it is a pickle, or the settings do not go together.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return _single_file(local, config, revision, allow_pickle)
    if is_run(local) or checkpoint_at(local) is not None:
        return _of_run(local)
    if config is not None:
        raise ModelError(
            f"config is {config!r}, but {path} is no single checkpoint file: a folder or hub id "
            f"brings its own configuration, leave config out"
        )
    return _folder_or_hub(path, revision, variant, allow_pickle)


def _of_run(path: Path) -> AbstractLocation:
    """What a run trained, if that is a model and no adapter."""
    checkpoint = checkpoint_at(path)
    run = path if checkpoint is None else checkpoint.run
    model = model_of_run(run)
    if checkpoint is None and any((run / FINAL / name).is_file() for name in (_INDEX, _LONE[1])):
        return Folder(run / FINAL)
    if model.get("lora") or (checkpoint is None and (run / FINAL).is_dir()):
        raise ModelError(
            f"{path} is of a run that trained an adapter of {model['path']}: set path to that, and "
            f"lora.start to {path} (with rank, alpha and targets of {run / CONFIG})"
        )
    if checkpoint is None:
        raise ModelError(
            f"{path} is a run that has neither finished nor saved a checkpoint: there is no model"
        )
    if "base" in model:
        raise ModelError(
            f"{path} is of a run that trained a preference model, which makes no images"
        )
    base = locate(
        str(model["path"]),
        revision=model.get("revision"),
        variant=model.get("variant"),
        config=model.get("config"),
    )
    if model.get("unet"):
        base = with_network(base, str(model["unet"]), revision=model.get("unet_revision"))
    if model.get("vae"):
        vae = locate(str(model["vae"]), revision=model.get("vae_revision"))
        base = WithNetwork(base, vae, ITSELF, "vae")
    return WithCheckpoint(
        checkpoint,
        base,
        ITSELF if model.get("kind") == "vlm" else "unet",
        prediction_type=model.get("prediction_type"),
        zero_terminal_snr=model.get("zero_terminal_snr"),
    )


def _folder_or_hub(
    path: str, revision: str | None, variant: str | None, allow_pickle: bool
) -> Folder | Hub:
    local = Path(path).expanduser()
    if local.is_dir():
        if revision is not None:
            raise ModelError(
                f"revision is {revision!r}, but {path} is a local folder: leave it out"
            )
        return Folder(local, variant, allow_pickle)
    looks_like_file = local.parent.is_dir() or local.suffix == ".safetensors"
    if _HUB_ID.fullmatch(path) and not looks_like_file:
        return Hub(path, revision, variant, allow_pickle)
    siblings = [entry.name for entry in local.parent.iterdir()] if local.parent.is_dir() else []
    hint = did_you_mean(local.name, siblings, prefix=f"{local.parent}/")
    raise ModelError(
        f"there is no {path}. Give a model folder, a .safetensors checkpoint, or a hub id of "
        f"the form owner/name.{hint}"
    )


def _single_file(
    path: Path, config: str | None, revision: str | None, allow_pickle: bool
) -> SingleFile:
    if path.suffix != ".safetensors" and not allow_pickle:
        if path.suffix in _PICKLES:
            raise ModelError(_pickle_refusal(str(path)))
        raise ModelError(f"{path} is a file, but not a .safetensors checkpoint")
    if config is None:
        raise ModelError(
            f"{path} is a single checkpoint file and holds no configuration. Set config to a "
            f"diffusers folder or hub id of the same architecture, for example "
            f"stabilityai/stable-diffusion-xl-base-1.0"
        )
    return SingleFile(path, _folder_or_hub(config, revision, None, allow_pickle=False))


_DENOISER = "model.diffusion_model."
_INPUT = f"{_DENOISER}input_blocks.0.0.weight"
"""The first convolution of a denoiser in the original layout, of shape [width, channels, 3, 3]."""
_PREDICTION_WORDS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "velocity": "v_prediction",
}


def _header(path: Path) -> tuple[set[str], dict[str, str]]:
    """Names of tensors, and metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys()), dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as a .safetensors checkpoint: {error}") from error


def _input_channels(path: Path) -> int | None:
    if _INPUT not in _header(path)[0]:
        return None
    with safe_open(path, framework="pt") as file:
        return int(file.get_slice(_INPUT).get_shape()[1])


def _predicted(path: Path, names: set[str], metadata: Mapping[str, str]) -> str | None:
    """What people write into a checkpoint about what it predicts: an empty tensor named `v_pred`
    (NoobAI, ComfyUI), `modelspec.*` of the metadata (Stability's model specification), and `ss_*`
    of kohya's scripts."""
    said: dict[str, str] = {"key v_pred": "v"} if "v_pred" in names else {}
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if metadata.get(key):
            said[f"metadata {key}"] = metadata[key].strip().lower()
    if metadata.get("ss_v_parameterization", "").lower() == "true":
        said["metadata ss_v_parameterization"] = "v"
    for origin, word in said.items():
        if word not in _PREDICTION_WORDS:
            raise ModelError(
                f"{path}: {origin} is {word!r} (supported: epsilon and v_prediction). If the file "
                f"is wrong about itself, set prediction_type"
            )
    kinds = {_PREDICTION_WORDS[word] for word in said.values()}
    if len(kinds) > 1:
        raise ModelError(
            f"{path}: contradicts itself about what it predicts "
            f"({', '.join(f'{origin}: {word}' for origin, word in said.items())}): set "
            f"prediction_type to epsilon or v_prediction"
        )
    return kinds.pop() if kinds else None


def _lone(where: object) -> str:
    return (
        f"{where} has no {_INDEX}: it holds a denoiser alone: give it as unet, and as path the "
        f"model that it was trained from, such as stabilityai/stable-diffusion-xl-base-1.0"
    )


def _no_images(where: object, model_type: object) -> str:
    return (
        f"{where} has no {_INDEX}: it is a {model_type!s:.60} of transformers, which does not make "
        f"images. Vision-language models are trained as model.kind=vlm, and asked by diffalign "
        f"evaluate"
    )


def _pickle_refusal(given: str) -> str:
    return (
        f"{given}: a pickle, which a careless reader would let run any code. Convert it with "
        f"diffusers' save_pretrained(folder, safe_serialization=True), or set allow_pickle to "
        f"true: torch then reads tensors from it and nothing else (weights_only), which is safe as "
        f"far as torch has no hole there; prefer a source that you trust"
    )


def _ready(loaded: Any) -> Any:
    """A pipeline with all its networks in float32: transformers 5 keeps what type the file has.

    Not by an argument of the load: its name depends on the version of diffusers. (A lone network of
    diffusers is always read in float32.) Tokenizers that know no length, or one beyond the
    positions of their encoder, are given that of the encoder.
    """
    parts = getattr(loaded, "components", {})
    for part in parts.values():
        if isinstance(part, nn.Module):
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


def _parse(file: Path) -> dict[str, Any]:
    content = read_json(file, error=ModelError)
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold a JSON object, and holds a {type(content).__name__}")
    return content


def _digest(file: Path) -> str:
    """Of the size and 64 evenly spaced blocks: milliseconds for 10 GB, and no fine-tune of a model
    leaves all of these blocks as they were."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with file.open("rb") as stream:
        for block in range(_BLOCKS):
            stream.seek(max(size - _BLOCK, 0) * block // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()
