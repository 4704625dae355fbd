"""Trained models as `diffalign export` finds them: of a run, a checkpoint, or an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from torch import Tensor

from diffalign import config as configs
from diffalign.commands import command
from diffalign.errors import ConfigError, ModelError
from diffalign.files import read_tensors
from diffalign.generation.manifest import MANIFEST, read_manifest
from diffalign.generation.models import ModelSpec, diffusion_settings, locate_model
from diffalign.models.adapter_files import locate_adapter, read_adapter
from diffalign.models.base import AbstractModel
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.export import with_weights
from diffalign.models.diffusion.kohya import LoraLayer, lora_layers
from diffalign.models.diffusion.pipeline_lora import put_adapters, read_adapters
from diffalign.models.weights import cast_blank
from diffalign.training.card import results_of
from diffalign.training.checkpoint import checkpoints_in, verify
from diffalign.training.config import RunConfig


@dataclass(frozen=True)
class Trained:
    """A model to export: its settings, and what was trained of it."""

    title: str
    """Name of the result."""
    home: Path
    """Where exports go by default."""
    model: AbstractModel
    """Settings that open its base."""
    layers: Mapping[str, LoraLayer] | None = None
    """An image model's adapter by modules; None where all weights trained."""
    others: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """The share of an adapter outside a run in the text encoders, by their names and peft's."""
    folder: Path | None = None
    """Folder that the run wrote at its end; None for a checkpoint."""
    values: Mapping[str, Tensor] | None = None
    """Of a checkpoint: all trained parameters, by name."""
    run: RunConfig | None = None


def find_trained(path: Path, base: ModelSpec | str | None) -> Trained:
    """Find what a path names.

    Args:
        path: the folder of a run or of a checkpoint, or an adapter: its file or its folder.
        base: the model that an adapter outside of its run is for; None for all others.

    Raises:
        ConfigError: there is nothing, or base is missing or not asked for.
        ModelError, CheckpointError: files are missing or damaged.
    """
    path = path.expanduser()
    if not path.exists():
        raise ConfigError(f"{path}: there is no such run, checkpoint or adapter")
    trained = _of_training(path)
    if trained is None:
        return _of_file(path, base)
    if base is not None:
        raise ConfigError(
            f"base is for an adapter outside its run, and {path} is of a run whose config.yaml "
            f"names its base: leave base out"
        )
    return trained


def _of_training(path: Path) -> Trained | None:
    """Find what a run made, where a path names the run, its result or a checkpoint of it."""
    if (path / "config.yaml").is_file():
        return _of_run(path)
    if path.is_file() and path.parent.name == "final":
        path = path.parent
    if (path.parent / "config.yaml").is_file():
        if path.name == "final":
            return _of_run(path.parent)
        if (path / "state.json").is_file():
            return _of_checkpoint(path)
    return None


def _config_of(folder: Path) -> RunConfig:
    """The config of the run that lies in a folder, wherever that was when it trained."""
    return replace(configs.load(RunConfig, folder / "config.yaml"), output=folder)


def _of_run(folder: Path) -> Trained:
    run_config = _config_of(folder)
    final = folder / "final"
    if not final.is_dir():
        saved = checkpoints_in(folder)
        hint = f", for example {saved[-1]}" if saved else ""
        again = command("train", config=folder / "config.yaml", options=["--resume"])
        raise ConfigError(
            f"{folder}: this run has no folder named final, so it has not finished. Continue it "
            f"with: {again}; or export a checkpoint of it{hint}"
        )
    trained = Trained(
        title=folder.resolve().name,
        home=folder / "export",
        model=run_config.model,
        folder=final,
        run=run_config,
    )
    if isinstance(run_config.model, AbstractDiffusion) and run_config.model.lora is not None:
        scale = run_config.model.lora.scale
        adapter = read_adapter(locate_adapter(final), component=run_config.model.component)
        layers = lora_layers(adapter.tensors | adapter.modules, 1.0, where=str(final))
        # What diffusers reads has the scale multiplied in; here it is on its own again.
        return replace(
            trained,
            layers={n: replace(v, up=v.up / scale, scale=scale) for n, v in layers.items()},
        )
    return trained


def _of_checkpoint(folder: Path) -> Trained:
    run_config = _config_of(folder.parent)
    verify(folder)
    # What the run would have exported: the moving average of the weights where it keeps one.
    kept = [folder / f"{name}.safetensors" for name in ("average", "weights")]
    file = next((file for file in kept if file.is_file()), None)
    if file is None:
        raise ModelError(f"{folder} holds no weights: there is no {kept[1].name} in it")
    values = read_tensors(file, error=ModelError)
    trained = Trained(
        title=f"{folder.resolve().parent.name}-{folder.name.rpartition('-')[2]}",
        home=folder.parent / "export",
        model=run_config.model,
        values=values,
        run=run_config,
    )
    if isinstance(run_config.model, AbstractDiffusion) and run_config.model.lora is not None:
        named = {name.replace(".default", "", 1): value for name, value in values.items()}
        layers = lora_layers(named, run_config.model.lora.scale, where=str(folder))
        return replace(trained, layers=layers)
    return trained


def _of_file(path: Path, base: ModelSpec | str | None) -> Trained:
    file = locate_adapter(path)
    if base is None:
        raise ConfigError(
            f"{path} is an adapter outside its run, which does not say what it changes: name the "
            f"model that it is for with base=FOLDER_OR_HUB_ID"
        )
    spec = ModelSpec(path=base) if isinstance(base, str) else base
    model = diffusion_settings(replace(spec, lora=None))
    adapters = read_adapters(
        getattr(diffusers, model.pipeline), file, unet_config=model.network_config
    )
    own = adapters.pop(model.component, {})
    return Trained(
        title=file.stem if path.is_file() else path.resolve().name,
        home=file.parent / "export",
        model=model,
        layers=lora_layers(own, 1.0, where=str(file)),
        others=adapters,
    )


def peft_state(layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    """An adapter by peft's names with a scale of one, which every reader takes for granted."""
    state = {}
    for module, layer in layers.items():
        state[f"{module}.lora_A.weight"] = layer.down
        state[f"{module}.lora_B.weight"] = layer.up * layer.scale
        if layer.magnitude is not None:
            state[f"{module}.lora_magnitude_vector"] = layer.magnitude
    return state


def merged_pipeline(trained: Trained, model: AbstractDiffusion, dtype: torch.dtype) -> Any:
    """The pipeline with what was trained in its weights, on the CPU.

    What nothing is merged into is read in `dtype`, the rest in float32.
    """
    if trained.layers is not None:
        text_dtype = torch.float32 if trained.others else dtype
        pipeline = model.parts.read(text_dtype=text_dtype, vae_dtype=dtype)
        adapters = {model.component: peft_state(trained.layers), **trained.others}
        put_adapters(pipeline, adapters, where=trained.title, merge=True)
        return pipeline
    if trained.folder is not None:  # all else is there too
        parts = type(model)(path=str(trained.folder)).parts
        network = cast_blank(parts.blank_network(), dtype)
    else:
        assert trained.values is not None
        parts = model.parts
        network = with_weights(parts.blank_network(), trained.values)
    return parts.read(network, text_dtype=dtype, vae_dtype=dtype)


def results_of_weights(run: Path, console: Console) -> list[Path]:
    """The comparisons in the folder of a run whose images its final weights made.

    A run may have been trained further since; what was measured before is left out, and said.
    """
    found = results_of(run)
    if not found:
        return []
    try:
        weights = locate_model(ModelSpec(path=str(run))).fingerprint()
    except ModelError:  # no image model, or a base that is not here: nothing to hold it against
        return found
    kept = []
    for path in found:
        images = path.parent
        if not (images / MANIFEST).is_file() or any(
            row.fingerprint == weights for row in read_manifest(images)
        ):
            kept.append(path)
            continue
        console.print(
            f"Left out of the card, as it is about other weights than {run / 'final'}: {path}",
            markup=False,
            soft_wrap=True,
        )
    return kept
