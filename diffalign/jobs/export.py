"""`diffalign export RUN`: what a run trained, in the form that another program opens."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign import config as configs
from diffalign.commands import command
from diffalign.errors import ConfigError, ModelError
from diffalign.files import replacing_file
from diffalign.generation.manifest import MANIFEST, read_manifest
from diffalign.generation.models import ModelSpec, diffusion_settings, locate_model
from diffalign.jobs.quiet import quieten_libraries
from diffalign.models.adapter_files import (
    PEFT_FILE,
    locate_adapter,
    read_adapter,
)
from diffalign.models.base import AbstractModel
from diffalign.models.devices import DTYPES, Precision
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.export import replacing, write_adapter, write_pipeline
from diffalign.models.diffusion.kohya import KOHYA_FILE, LoraLayer, cast, lora_layers, modelspec
from diffalign.models.diffusion.original_layout import checkpoint_tensors
from diffalign.models.diffusion.pipeline_lora import put_adapters, read_adapters
from diffalign.models.vlm.config import VLM
from diffalign.training.card import (
    read_evaluations,
    results_of,
    write_cards,
    write_model_card,
)
from diffalign.training.checkpoint import checkpoints_in, verify
from diffalign.training.config import RunConfig

Form = Literal["kohya", "diffusers", "peft", "folder", "single_file", "card"]

FORMS: dict[Form, str] = {
    "kohya": "a LoRA for ComfyUI, A1111 and kohya's tools",
    "diffusers": "a LoRA for diffusers' load_lora_weights",
    "peft": "an adapter for peft's from_pretrained",
    "folder": "the whole model as a folder for from_pretrained",
    "single_file": "the whole model as one file in the original layout, for ComfyUI and A1111",
    "card": "a model card with the results of today",
}

DORA_NOTE = (
    "The adapter is a DoRA. A1111 takes its magnitudes for those of inputs, and ComfyUI divides "
    "by the lengths of the base's weights, not of the changed ones, so images differ a little: "
    "for the same images export form=single_file"
)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is exported, in which form, and where to."""

    run: Path
    """Folder of a run, of a checkpoint of a run, or an adapter: its file or its folder."""
    form: Form | None = None
    """`kohya`: a LoRA file for ComfyUI, A1111 and kohya's tools; `diffusers`: a folder for
    `load_lora_weights`; `peft`: one for peft; `folder`: the whole model, an adapter merged into it,
    as `from_pretrained` reads it; `single_file`: the same as one file in the layout of the original
    releases; `card`: the model card of the run anew, with the results that there are by now. Null
    is kohya for the LoRA of an image model, peft for that of a vision-language
    model, single_file for all weights of an image model, else folder."""
    base: ModelSpec | str | None = None
    """The model that an adapter is for, where it lies outside its run: a folder, a hub id, a
    `.safetensors` checkpoint, or these and more as keys (`base.path=`, `base.config=`)."""
    dtype: Precision = "float32"
    """Of the numbers in the export. What is trained is kept in float32; bf16 and fp16 halve the
    file and round."""
    output: Path | None = None
    """File or folder to write, which must not exist; null is one in the folder `export` of the run,
    named after it."""
    results: tuple[Path, ...] = ()
    """Results that the model card shows: folders of `compare`, and files of what `evaluate --json`
    printed. Empty takes the comparisons in the run's folder."""

    def __post_init__(self) -> None:
        if self.form == "card" and self.output is not None:
            raise ValueError("form is card, which lies in the folder of the run: leave output out")


@dataclass(frozen=True)
class Trained:
    """What there is to export."""

    title: str
    """Name of the result."""
    home: Path
    """Where exports go by default."""
    model: AbstractModel
    """Settings that open its base."""
    layers: Mapping[str, LoraLayer] | None = None
    """An image model's adapter by modules; None where all weights trained."""
    others: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """What an adapter outside a run does to the text encoders, by their names and peft's."""
    folder: Path | None = None
    """What the run wrote at its end; None for a checkpoint."""
    values: Mapping[str, Tensor] | None = None
    """Of a checkpoint: all trained parameters, by name."""
    run: RunConfig | None = None


def run(config: ExportConfig) -> Path:
    """Export.

    Returns:
        The file or folder that was written.

    Raises:
        ConfigError: there is nothing to export, or the form cannot hold it.
        ModelError, CheckpointError: files are missing or damaged.
    """
    console = Console(highlight=False)
    quieten_libraries()
    trained = _find(config)
    form = config.form or _usual_form(trained)
    _refuse(trained, form)
    if form == "card":
        assert trained.run is not None, "_refuse() was called"
        path, *_ = write_cards(
            trained.run, config.results or results_of_weights(trained.run.output, console)
        )
        console.print(
            f"[green]Done:[/green] {escape(str(path))}, and next to the weights in final/"
        )
        console.print(_next_step(path.parent / "final", form), markup=False, soft_wrap=True)
        return path
    output = config.output or trained.home / _file_name(trained.title, form)
    _refuse_place(output, form)
    for path in config.results:
        read_evaluations(path)  # now, rather than after an hour of writing
    console.print(
        f"[bold]export[/bold]  {escape(str(config.run))} as {FORMS[form]}, {config.dtype}",
        soft_wrap=True,
    )
    if isinstance(trained.model, AbstractDiffusion):
        _export_images(trained, trained.model, form, DTYPES[config.dtype], output, console)
    else:
        assert isinstance(trained.model, VLM), "_refuse() was called"
        _export_vlm(trained, trained.model, form, DTYPES[config.dtype], output)
    if trained.run is not None and output.is_dir():
        whole = form == "folder"
        model = _merged_settings(trained.model) if whole else trained.model
        write_model_card(
            trained.run,
            output,
            usage=model.usage("USER/NAME"),
            results=config.results or results_of_weights(trained.run.output, console),
            merged=whole,
        )
    console.print(f"[green]Done:[/green] {escape(str(output))}", soft_wrap=True)
    console.print(_next_step(output, form), markup=False, soft_wrap=True)
    return output


def _merged_settings(model: AbstractModel) -> AbstractModel:
    """Settings of the whole model that an adapter makes."""
    if isinstance(model, VLM):
        return replace(model, lora=None, quantization=None, merge_on_export=False)
    assert isinstance(model, AbstractDiffusion)
    return replace(model, lora=None)


def _find(config: ExportConfig) -> Trained:
    """What `config.run` names."""
    path = config.run.expanduser()
    if not path.exists():
        raise ConfigError(f"{path}: there is no such run, checkpoint or adapter")
    trained = _of_training(path)
    if trained is None:
        return _of_file(path, config.base)
    if config.base is not None:
        raise ConfigError(
            f"base is for an adapter outside its run, and {path} is of a run whose config.yaml "
            f"names its base: leave base out"
        )
    return trained


def _of_training(path: Path) -> Trained | None:
    """What a run made, where a path names the run, its result or a checkpoint of it."""
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
    values = _read_tensors(file)
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


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error


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


def _usual_form(trained: Trained) -> Form:
    if isinstance(trained.model, AbstractDiffusion):
        return "kohya" if trained.layers is not None else "single_file"
    return "peft" if trained.model.trains_adapter else "folder"


def _refuse(trained: Trained, form: Form) -> None:
    """Raise ConfigError where a form cannot hold what was trained."""
    model = trained.model
    if form == "card":
        if trained.run is None or trained.folder is None:
            raise ConfigError("form is card, which is of a finished run: give the folder of one")
        return
    if not isinstance(model, (AbstractDiffusion, VLM)):
        raise ConfigError(
            f"{trained.title} trained {model.describe()}, which has one form only: what the run "
            f"wrote into final/"
        )
    images = isinstance(model, AbstractDiffusion)
    adapter = model.trains_adapter or trained.layers is not None
    if form in ("kohya", "diffusers") and not images:
        raise ConfigError(
            f"form is {form}, which is for image models, and {trained.title} trained a "
            f"vision-language model: use form=peft or form=folder"
        )
    if form == "single_file" and not images:
        raise ConfigError(
            f"form is single_file, which holds Stable Diffusion models, and {trained.title} "
            f"trained a vision-language model: use form=folder"
        )
    if form == "peft" and images:
        raise ConfigError(
            "form is peft, which is for vision-language models: a LoRA of an image model is read "
            "by diffusers (form=diffusers), and by ComfyUI and A1111 (form=kohya)"
        )
    if form in ("kohya", "diffusers", "peft") and not adapter:
        raise ConfigError(
            f"form is {form}, and {trained.title} trained all weights, which no low-rank adapter "
            f"holds: use form=folder" + (" or form=single_file" if images else "")
        )
    if form in ("kohya", "diffusers") and trained.others:
        raise ConfigError(
            f"form is {form}, which is written for the UNet alone, and {trained.title} changes "
            f"{', '.join(trained.others)} as well: use form=folder or form=single_file"
        )


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


def _refuse_place(output: Path, form: Form) -> None:
    if output.exists():
        raise ConfigError(f"{output} exists: choose another place with output=, or remove it")
    one_file = form in ("kohya", "single_file")
    if one_file != (output.suffix == ".safetensors"):
        raise ConfigError(
            f"output is {output}, and form {form} is "
            + ("one file: its name must end in .safetensors" if one_file else "a folder")
        )


def _file_name(title: str, form: Form) -> str:
    return {
        "kohya": f"{title}_lora.safetensors",
        "single_file": f"{title}.safetensors",
        "diffusers": f"{title}_diffusers",
        "peft": f"{title}_peft",
        "folder": f"{title}_merged",
    }[form]


def _export_images(
    trained: Trained,
    model: AbstractDiffusion,
    form: Form,
    dtype: torch.dtype,
    output: Path,
    console: Console,
) -> None:
    if form in ("kohya", "diffusers"):
        assert trained.layers is not None, "_refuse() was called"
        kohya = None
        try:
            kohya = model.kohya_lora(trained.layers, dtype=dtype, title=trained.title)
        except ModelError as error:
            if form == "kohya":
                raise
            console.print(f"[yellow]Without {KOHYA_FILE}: {escape(str(error))}", soft_wrap=True)
        if kohya is not None and any(
            layer.magnitude is not None for layer in trained.layers.values()
        ):
            console.print(f"[yellow]{DORA_NOTE}", soft_wrap=True)
        if form == "kohya":
            assert kohya is not None
            with replacing_file(output) as draft:
                save_file(kohya.tensors, draft, metadata=kohya.metadata)
            return
        state = {
            name: cast(value, dtype, name) for name, value in _peft_state(trained.layers).items()
        }
        write_adapter(
            output,
            pipeline=getattr(diffusers, model.pipeline),
            component=model.component,
            state=state,
            kohya=kohya,
        )
        return
    pipeline = _merged(trained, model)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            for name, parameter in part.named_parameters():
                parameter.data = cast(parameter.data, dtype, name)
    if form == "folder":
        write_pipeline(output, pipeline)
        return
    tensors = {name: value.contiguous() for name, value in checkpoint_tensors(pipeline).items()}
    velocity = pipeline.scheduler.config.get("prediction_type") == "v_prediction"
    header = modelspec(
        pipeline.unet.config, title=trained.title, velocity=velocity, kind="checkpoint"
    )
    with replacing_file(output) as draft:
        save_file(tensors, draft, metadata={"format": "pt", **header})
    _print_limits(pipeline, velocity, console)


def _peft_state(layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    """An adapter by peft's names with a scale of one, which every reader takes for granted."""
    state = {}
    for module, layer in layers.items():
        state[f"{module}.lora_A.weight"] = layer.down
        state[f"{module}.lora_B.weight"] = layer.up * layer.scale
        if layer.magnitude is not None:
            state[f"{module}.lora_magnitude_vector"] = layer.magnitude
    return state


def _merged(trained: Trained, model: AbstractDiffusion) -> Any:
    """The pipeline with what was trained in its weights, float32 on the CPU."""
    if trained.layers is not None:
        pipeline = model.opened()
        adapters = {model.component: _peft_state(trained.layers), **trained.others}
        put_adapters(pipeline, adapters, where=trained.title, merge=True)
        return pipeline
    if trained.folder is not None:
        return type(model)(path=str(trained.folder)).opened()  # all else is in the folder
    return model.opened(trained.values)


def _print_limits(pipeline: Any, velocity: bool, console: Console) -> None:
    """What a single file does not say, and its readers take for granted."""
    usual = 0.13025 if hasattr(pipeline, "text_encoder_2") else 0.18215
    scaling = pipeline.vae.config.scaling_factor
    if scaling != usual:
        console.print(
            f"[yellow]The autoencoder scales latents by {scaling:g}, which a single file cannot "
            f"say: ComfyUI and A1111 will take it to be {usual:g}",
            soft_wrap=True,
        )
    if velocity:
        console.print(
            "[yellow]The model predicts velocity. ComfyUI sees that in the file of an SDXL and of "
            "an SD 2.x; elsewhere choose it by hand",
            soft_wrap=True,
        )


def _export_vlm(trained: Trained, model: VLM, form: Form, dtype: torch.dtype, output: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".export-", dir=_existing_parent(output)) as scratch:
        final = trained.folder
        if final is None:
            assert trained.values is not None
            final = Path(scratch) / "final"
            opened = replace(model, quantization=None, merge_on_export=False).load(
                device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
            )
            opened.export(final, trained.values)
            del opened
        if form == "peft":
            _copy_adapter(final, output, dtype)
        else:
            model.write_whole(output, final, dtype=dtype)


def _existing_parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent


def _copy_adapter(source: Path, output: Path, dtype: torch.dtype) -> None:
    """A folder of peft with its tensors in another dtype."""
    read = _read_tensors(source / PEFT_FILE)
    tensors = {name: cast(value, dtype, name) for name, value in read.items()}
    with replacing(output) as partial:
        for file in source.iterdir():
            if file.is_file() and file.name not in (PEFT_FILE, "README.md"):
                shutil.copy2(file, partial / file.name)
        save_file(tensors, partial / PEFT_FILE, metadata={"format": "pt"})


def _next_step(output: Path, form: Form) -> str:
    if form == "kohya":
        return "Next: copy it into models/loras of ComfyUI, or models/Lora of A1111"
    if form == "single_file":
        return (
            "Next: copy it into models/checkpoints of ComfyUI, or models/Stable-diffusion of A1111"
        )
    return f"Next: publish it with\n  hf upload USER/NAME {shlex.quote(str(output))}"
