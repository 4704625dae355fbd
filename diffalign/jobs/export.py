"""`diffalign export RUN`: a trained model in the form that another program opens."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from rich.console import Console
from rich.markup import escape
from safetensors.torch import save_file

from diffalign.console import silence_libraries
from diffalign.errors import ConfigError, ModelError
from diffalign.files import read_tensors, replacing_file, writing
from diffalign.generation.models import ModelSpec
from diffalign.jobs.trained import (
    Trained,
    find_trained,
    merged_pipeline,
    peft_state,
    results_of_weights,
)
from diffalign.models.adapter_files import (
    PEFT_FILE,
)
from diffalign.models.base import AbstractModel
from diffalign.models.devices import DTYPES, Precision
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.export import replacing, write_adapter, write_pipeline
from diffalign.models.diffusion.kohya import KOHYA_FILE, cast, modelspec
from diffalign.models.diffusion.original_layout import checkpoint_tensors
from diffalign.models.vlm.config import VLM
from diffalign.training.card import (
    read_evaluations,
    write_cards,
    write_model_card,
)

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
    """Model, form and place of an export."""

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


def run(config: ExportConfig) -> Path:
    """Export.

    Returns:
        The file or folder that was written.

    Raises:
        ConfigError: there is nothing to export, or the form cannot hold it.
        ModelError, CheckpointError: files are missing or damaged.
    """
    console = Console(highlight=False)
    silence_libraries()
    trained = find_trained(config.run, config.base)
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
    with writing(output):
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


def _usual_form(trained: Trained) -> Form:
    if isinstance(trained.model, AbstractDiffusion):
        known = trained.model.original_layout
        if trained.layers is not None:
            return "kohya" if known else "diffusers"
        return "single_file" if known else "folder"
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
    if form in ("kohya", "single_file") and not getattr(model, "original_layout", False):
        network = getattr(model, "network_config", {}).get("_class_name")
        raise ConfigError(
            f"form is {form}, which has no names for the layers of {network}: use form=diffusers "
            f"for an adapter (ComfyUI reads it as well), or form=folder"
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
            f"form is {form}, which is written for the denoiser alone, and {trained.title} changes "
            f"{', '.join(trained.others)} as well: use form=folder or form=single_file"
        )


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
            if model.original_layout:
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
            name: cast(value, dtype, name) for name, value in peft_state(trained.layers).items()
        }
        write_adapter(
            output,
            pipeline=getattr(diffusers, model.pipeline),
            component=model.component,
            state=state,
            kohya=kohya,
        )
        return
    pipeline = merged_pipeline(trained, model, dtype)
    for part, network in pipeline.components.items():
        if isinstance(network, torch.nn.Module):
            for name, parameter in network.named_parameters():
                parameter.data = cast(parameter.data, dtype, f"{part}.{name}")
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


def _print_limits(pipeline: Any, velocity: bool, console: Console) -> None:
    """Print what a single file does not say, and its readers take for granted."""
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
    read = read_tensors(source / PEFT_FILE, error=ModelError)
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
