"""Find the diffusion model that a person names: to sample images from it, or to train on.

Whatever a person has is found: a diffusers folder, a hub id, a single checkpoint file, an adapter
with its base, the folder of a training run, or a checkpoint of one. All roads lead to the settings
that training opens models with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diffalign import components
from diffalign.commands import command
from diffalign.errors import ModelError
from diffalign.models.adapter_files import ADAPTER_FILE, locate_adapter
from diffalign.models.base import AbstractModel
from diffalign.models.diffusion.conditioning import cut_prompts
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.parts import INDEX_FILE
from diffalign.models.locate import locate
from diffalign.models.lora import settings_of
from diffalign.models.runs import CONFIG, FINAL, checkpoint_at, is_run, model_of_run


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Where a model lies."""

    path: str
    """A diffusers folder, a hub id, a `.safetensors` checkpoint, or the folder of a training run,
    which represents its result (`final`), or while it has not finished for its newest checkpoint;
    or one of its checkpoints."""
    revision: str | None = None
    """Commit, branch or tag of a hub id."""
    variant: str | None = None
    """Which weight files to take where a folder has several, such as fp16."""
    config: str | None = None
    """For a single checkpoint, a folder or hub id of the same architecture."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the network predicts; null takes what the single file says of itself, then what the
    scheduler's configuration says."""
    zero_terminal_snr: bool | None = None
    """Whether the last timestep holds no image at all; null takes what the files say."""
    unet: str | None = None
    """Another denoiser in the place of the model's own: a folder or hub id that holds one, alone or
    in a folder `unet`, or a `.safetensors` file of one."""
    unet_revision: str | None = None
    """Commit, branch or tag of that denoiser's hub id."""
    lora: Path | None = None
    """An adapter for the model at `path`: a `.safetensors` file, or a folder that holds one."""


@dataclass(frozen=True)
class LocatedModel:
    """A model that is known to be there, before its weights are read."""

    settings: AbstractDiffusion
    """Of the base, as training opens it."""
    lora: Path | None
    """One `.safetensors` file."""

    def fingerprint(self) -> str:
        """Identifies the weights and their schedule: 16 hexadecimal digits."""
        return self.settings.parts.image_fingerprint(self.lora)

    def truncated(self, texts: Iterable[str]) -> list[str]:
        """The prompts that are longer than a text encoder reads."""
        texts = list(texts)
        cut = set(cut_prompts(self.settings.tokenizers(), texts).cut)
        return [text for text in texts if text in cut]


def locate_model(spec: ModelSpec) -> LocatedModel:
    """Find a model to sample from; of a hub id, the configurations are fetched.

    Raises:
        ModelError: nothing of the kind is there, a part is missing, it is a pickle, or no backbone
            is of its pipeline class.
    """
    spec = without_run(spec)
    model = LocatedModel(_settings(spec), spec.lora)
    model.settings.check_to_sample()
    return model


def diffusion_settings(spec: ModelSpec) -> AbstractDiffusion:
    """Settings under which training would begin with the very model.

    Weights, adapter and text encoders then go through the code that training loads them with, so
    that the density of a step is that which training will measure.

    Raises:
        ModelError: nothing of the kind is there, no backbone is of its pipeline class, or it cannot
            be trained.
    """
    spec = without_run(spec)
    model = _settings(spec)
    if spec.lora is not None:
        model = replace(model, lora=settings_of(spec.lora, component=model.component))
    model.check()
    return model


def _settings(spec: ModelSpec) -> AbstractDiffusion:
    """Settings of the base, of the backbone whose pipeline class its index names."""
    location = locate(spec.path, revision=spec.revision, variant=spec.variant, config=spec.config)
    backbone = _backbone(str(location.read_json(INDEX_FILE).get("_class_name")), spec.path)
    names = ("path", "revision", "variant", "config", "unet", "unet_revision")
    schedule = ("prediction_type", "zero_terminal_snr")
    return backbone(**{name: getattr(spec, name) for name in (*names, *schedule)})


def _backbone(pipeline: str, path: str) -> type[AbstractDiffusion]:
    found: dict[str, type[AbstractDiffusion]] = {}
    for kind in components.kinds(AbstractModel):
        backbone = components.find(AbstractModel, kind)  # type: ignore[type-abstract]
        if issubclass(backbone, AbstractDiffusion):
            # Of kinds with one pipeline the first: a new file does not change what is sampled.
            found = dict.fromkeys((backbone.pipeline, *backbone.same_parts), backbone) | found
    if pipeline not in found:
        raise ModelError(
            f"{path} holds a {pipeline}, from which no images are sampled here (those of "
            f"{', '.join(found)} are)"
        )
    return found[pipeline]


def without_run(spec: ModelSpec) -> ModelSpec:
    """The same model in terms of what lies there: a base, and the file of an adapter if any.

    A run is what it trained, one that has not finished what its newest checkpoint holds.

    Raises:
        ModelError: a run without a checkpoint, or an adapter where a base belongs.
    """
    path = Path(spec.path).expanduser()
    lora = locate_adapter(spec.lora) if spec.lora is not None else None
    checkpoint = checkpoint_at(path)
    if checkpoint is None and is_run(path) and not (path / FINAL).is_dir():
        raise ModelError(
            f"{path}: this run has neither finished nor saved a checkpoint. Continue it with: "
            + command("train", config=path / CONFIG, options=["--resume"])
        )
    if checkpoint is not None or is_run(path):
        run = path if checkpoint is None else checkpoint.run
        if checkpoint is None and (path / FINAL / INDEX_FILE).is_file():
            return ModelSpec(path=str(path / FINAL), lora=lora)
        model = model_of_run(run)
        if checkpoint is not None and not model.get("lora"):
            return ModelSpec(path=str(checkpoint.folder), lora=lora)
        if lora is not None:
            raise ModelError(f"{path} is itself of a run that trained an adapter: leave lora out")
        return replace(_base_of_run(model), lora=locate_adapter(path))
    if (path / ADAPTER_FILE).is_file():
        raise ModelError(f"{path} is an adapter: give it as lora, and its base as path")
    return replace(spec, lora=lora)


def base_of_run(run: Path) -> ModelSpec:
    """The model that a training run started from: its base, and the adapter it went on from.

    Raises:
        ModelError: the folder does not say.
    """
    model = model_of_run(run)
    start = (model.get("lora") or {}).get("start")
    base = _base_of_run(model)
    return base if start is None else replace(base, lora=locate_adapter(Path(start)))


def _base_of_run(model: Mapping[str, Any]) -> ModelSpec:
    """What a run started from, as its config names it."""
    kept = ("revision", "variant", "config", "unet", "unet_revision")
    schedule = ("prediction_type", "zero_terminal_snr")
    return ModelSpec(path=str(model["path"]), **{key: model.get(key) for key in (*kept, *schedule)})
