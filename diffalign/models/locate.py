"""Where a model's weights come from: a folder, a hub id, a single file, a run, or a mixture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign import components
from diffalign.errors import ModelError, did_you_mean
from diffalign.models.base import AbstractModel
from diffalign.models.locations import (
    INDEX,
    ITSELF,
    LONE_CONFIGS,
    PICKLES,
    AbstractLocation,
    Folder,
    Hub,
    file_digest,
    pickle_refusal,
)
from diffalign.models.runs import (
    CONFIG,
    FINAL,
    RunCheckpoint,
    checkpoint_at,
    is_run,
    model_of_run,
)
from diffalign.models.single_file import SingleFile
from diffalign.models.weights import Stored

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class WithCheckpoint(AbstractLocation):
    """The model that a run trained all weights of, as it was at a checkpoint."""

    checkpoint: RunCheckpoint
    base: AbstractLocation
    """The model that the run started from."""
    component: str
    """The network that it trained."""
    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None
    """The noise schedule, as the config of the run has it."""

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
        if self.component not in components:
            self._fill(loaded)
        return loaded

    def stored(self, component: str, config: Mapping[str, Any]) -> dict[str, Stored] | None:
        base = self.base.stored(component, config)
        if component != self.component or base is None:
            return base
        trained = self.checkpoint.stored()
        if other := sorted(trained.keys() - base.keys()):
            raise ModelError(
                f"{self.checkpoint.file}: holds {other[0]}, and {self.base} has no such weight: "
                f"the run started from another model"
            )
        return base | trained

    def load_text_encoder(self, name: str, model_class: Any, dtype: torch.dtype) -> Any | None:
        return self.base.load_text_encoder(name, model_class, dtype)

    def load_complete(self, model_class: Any, **options: Any) -> Any:
        model = self.base.load_complete(model_class, **options)
        self._fill(model)
        return model

    def _fill(self, model: Any) -> None:
        """Put the trained values into the network that the run trained."""
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

    def tokenizer(self, name: str) -> Any:
        return self.base.tokenizer(name)

    def identity(self, component: str) -> str:
        own = component == self.component
        return file_digest(self.checkpoint.file) if own else self.base.identity(component)


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

    def stored(self, component: str, config: Mapping[str, Any]) -> dict[str, Stored] | None:
        if component == self.component:
            return self.network.stored(self.inside, config)
        return self.base.stored(component, config)

    def load_text_encoder(self, name: str, model_class: Any, dtype: torch.dtype) -> Any | None:
        return self.base.load_text_encoder(name, model_class, dtype)

    def load(self, pipeline: Any, **components: Any) -> Any:
        if self.component not in components:
            config = self.read_json(f"{self.component}/config.json")
            components[self.component] = self._read(config)
        return self.base.load(pipeline, **components)

    def _read(self, config: Mapping[str, Any]) -> Any:
        import diffusers  # takes seconds, and not every location is of an image generator

        network_class = getattr(diffusers, str(config.get("_class_name")))
        inside = {} if self.inside == ITSELF else {"subfolder": self.inside}
        return self.network.load(network_class, **inside)

    def tokenizer(self, name: str) -> Any:
        return self.base.tokenizer(name)

    def identity(self, component: str) -> str:
        if component == self.component:
            return self.network.identity(self.inside)
        return self.base.identity(component)


def with_network(
    base: AbstractLocation,
    path: str,
    *,
    component: str = "unet",
    revision: str | None = None,
    variant: str | None = None,
) -> WithNetwork:
    """A model with another denoiser in the place of its own.

    Args:
        base: the model.
        path: a folder or hub id that holds a denoiser, alone or in a folder of the component's
            name, or a `.safetensors` file with one, in the original layout (of a UNet) or that of
            diffusers.
        component: what the denoiser is called within the pipeline.
        revision: branch, tag or commit of a hub id.
        variant: part of the weights' file names, such as `fp16`.

    Raises:
        ModelError: there is none.
    """
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix != ".safetensors":
            raise ModelError(f"unet: {path} is a file, but not a .safetensors checkpoint")
        return WithNetwork(base, SingleFile(local, base), component, component)
    try:
        network = locate(path, revision=revision, variant=variant)
        try:
            network.read_json(f"{component}/config.json")
        except ModelError:
            network.read_json(f"{ITSELF}/config.json")
            return WithNetwork(base, network, ITSELF, component)
    except ModelError as error:
        raise ModelError(f"unet: {error}") from error
    return WithNetwork(base, network, component, component)


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
    """The model that a run trained; an adapter is refused."""
    checkpoint = checkpoint_at(path)
    run = path if checkpoint is None else checkpoint.run
    model = model_of_run(run)
    if checkpoint is None and any(
        (run / FINAL / name).is_file() for name in (INDEX, LONE_CONFIGS[1])
    ):
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
    component = _trained_component(str(model.get("kind")))
    if model.get("unet"):
        base = with_network(
            base, str(model["unet"]), component=component, revision=model.get("unet_revision")
        )
    if model.get("vae"):
        vae = locate(str(model["vae"]), revision=model.get("vae_revision"))
        base = WithNetwork(base, vae, ITSELF, "vae")
    return WithCheckpoint(
        checkpoint,
        base,
        component,
        prediction_type=model.get("prediction_type"),
        zero_terminal_snr=model.get("zero_terminal_snr"),
    )


def _trained_component(kind: str) -> str:
    """What a kind of model calls the network that it trains."""
    settings = components.find(AbstractModel, kind)  # type: ignore[type-abstract]
    return getattr(settings, "component", ITSELF)


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
        if path.suffix in PICKLES:
            raise ModelError(pickle_refusal(str(path)))
        raise ModelError(f"{path} is a file, but not a .safetensors checkpoint")
    if config is None:
        raise ModelError(
            f"{path} is a single checkpoint file and holds no configuration. Set config to a "
            f"diffusers folder or hub id of the same architecture, for example "
            f"stabilityai/stable-diffusion-xl-base-1.0"
        )
    return SingleFile(path, _folder_or_hub(config, revision, None, allow_pickle=False))
