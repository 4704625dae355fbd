"""Checkpoints and runs as models: to go on from, and to sample from."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from diffalign.config import to_dict
from diffalign.errors import ModelError
from diffalign.generation.models import ModelSpec, diffusion_settings, locate_model
from diffalign.generation.text_to_image import SamplerConfig, TextToImage
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings
from diffalign.models.vlm.config import VLM
from diffalign.training.checkpoint import Checkpoint, save_checkpoint
from tests.original_layout import write_single_file
from tests.tiny_vlm import tiny_llava

CPU = torch.device("cpu")
LORA = LoraSettings(rank=2, alpha=3)


def load(settings: Any, **options: Any) -> Any:
    return settings.load(device=CPU, compute_dtype=torch.float32, reference="none", **options)


def change(model: Any, by: float) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def train(settings: Any, run: Path, *, average: bool = False, by: float = 0.2) -> Any:
    """What a run leaves that was killed after two checkpoints, and the model that it had."""
    model = load(settings)
    run.mkdir(exist_ok=True)
    section = {"kind": type(settings).__name__.lower(), **to_dict(settings)}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": section}))
    for step in (100, 200):
        change(model, by)
        weights = dict(model.trained_parameters())
        groups = {"weights": weights}
        if average:
            groups = {"weights": {n: v + 1 for n, v in weights.items()}, "average": weights}
        save_checkpoint(run, Checkpoint(step=step, tensors=groups, state={}), keep=2)
    return model


def predict(model: Any) -> torch.Tensor:
    noisy = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(3))
    with model.sampling():
        return model.denoiser(["a red thing"], guidance=1)(noisy, torch.tensor([400]))


def images(spec: ModelSpec) -> torch.Tensor:
    opened = TextToImage.open(
        locate_model(spec), SamplerConfig(steps=2), device=CPU, dtype=torch.float32
    )
    return opened.generate(["a cat"], [0])


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("lora", [LORA, dataclasses.replace(LORA, dora=True), None])
def test_an_unfinished_run_is_sampled_from_at_its_newest_checkpoint(
    tiny_sdxl, tmp_path, lora, average
):
    run = tmp_path / "run"
    model = train(SDXL(path=str(tiny_sdxl), lora=lora), run, average=average)

    newest = images(ModelSpec(path=str(run)))
    named = images(ModelSpec(path=str(run / "checkpoint-200")))
    older = images(ModelSpec(path=str(run / "checkpoint-100")))
    model.export(run / "final")
    exported = images(ModelSpec(path=str(run)))

    assert torch.equal(newest, named)
    torch.testing.assert_close(newest, exported, atol=1e-4, rtol=0)
    assert (newest - older).abs().max() > 1e-3


@pytest.mark.parametrize("lora", [LORA, dataclasses.replace(LORA, dora=True, rslora=True)])
@pytest.mark.parametrize("place", ["run", "checkpoint"])
def test_training_goes_on_from_a_checkpoint_of_an_adapter(tiny_sdxl, tmp_path, lora, place):
    run = tmp_path / "run"
    model = train(SDXL(path=str(tiny_sdxl), lora=lora), run)
    start = run if place == "run" else run / "checkpoint-200"
    settings = SDXL(path=str(tiny_sdxl), lora=dataclasses.replace(lora, alpha=8, start=start))

    settings.check()

    torch.testing.assert_close(predict(load(settings)), predict(model), atol=1e-5, rtol=0)
    told = f"from {start}" + (" (which has not finished: checkpoint-200" if place == "run" else "")
    assert told in settings.describe()


@pytest.mark.parametrize("place", ["run", "checkpoint"])
def test_training_goes_on_from_a_checkpoint_of_all_weights(tiny_sdxl, tmp_path, place):
    run = tmp_path / "run"
    model = train(SDXL(path=str(tiny_sdxl), prediction_type="v_prediction"), run)
    path = run if place == "run" else run / "checkpoint-200"
    settings = SDXL(path=str(path))

    settings.check()

    assert torch.equal(predict(load(settings)), predict(model))
    assert type(settings.noising()).__name__ == "Velocity"  # as the run was told
    assert settings.policy_fingerprint() != SDXL(path=str(tiny_sdxl)).policy_fingerprint()
    model.export(run / "final")
    assert torch.equal(predict(load(SDXL(path=str(run)))), predict(model))


def test_trajectories_are_sampled_from_a_checkpoint_too(tiny_sdxl, tmp_path):
    for lora in (LORA, None):
        run = tmp_path / f"run-{lora is None}"
        model = train(SDXL(path=str(tiny_sdxl), lora=lora), run)
        opened = load(diffusion_settings(ModelSpec(path=str(run))), trainable=False)
        torch.testing.assert_close(predict(opened), predict(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("projector", ["frozen", "trained"])
def test_a_vision_language_adapter_goes_on_from_a_checkpoint(tmp_path, projector):
    base = VLM(path=str(tiny_llava(tmp_path / "llava")), lora=LORA, projector=projector)
    run = tmp_path / "run"
    model = train(base, run)
    settings = dataclasses.replace(base, lora=dataclasses.replace(LORA, alpha=5, start=run))

    settings.check()

    ratio = LORA.scale / settings.lora.scale
    ours, theirs = (dict(m.trained_parameters()) for m in (load(settings), model))
    for name, value in theirs.items():
        expected = value * ratio if ".lora_B." in name else value
        torch.testing.assert_close(ours[name], expected)
    assert "checkpoint-200" in settings.describe()


@pytest.mark.parametrize("place", ["run", "checkpoint", "final"])
def test_all_weights_of_a_vision_language_model_go_on_from_a_run(tmp_path, place):
    run = tmp_path / "run"
    base = VLM(path=str(tiny_llava(tmp_path / "llava")))
    model = train(base, run, by=0.02)
    if place == "final":
        model.export(run / "final")
    settings = VLM(path=str(run / "checkpoint-200" if place == "checkpoint" else run))

    settings.check()

    ours, theirs = (dict(m.trained_parameters()) for m in (load(settings), model))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)


def test_what_is_of_the_other_kind_of_run_is_refused_with_the_way(tiny_sdxl, tmp_path):
    base = SDXL(path=str(tiny_sdxl))
    whole, adapter = tmp_path / "whole", tmp_path / "adapter"
    train(base, whole)
    train(dataclasses.replace(base, lora=LORA), adapter)

    with pytest.raises(ModelError, match=r"trained all weights and no adapter: give it as path"):
        start = whole / "checkpoint-200"
        dataclasses.replace(base, lora=dataclasses.replace(LORA, start=start)).check()
    with pytest.raises(ModelError, match=r"trained an adapter of .*: set path to that, and lora"):
        SDXL(path=str(adapter / "checkpoint-200")).check()


def test_a_checkpoint_without_its_run_and_a_run_without_checkpoints_are_refused(
    tiny_sdxl, tmp_path
):
    run = tmp_path / "run"
    train(SDXL(path=str(tiny_sdxl)), run)
    moved = Path(shutil.move(run / "checkpoint-200", tmp_path / "moved"))
    with pytest.raises(ModelError, match=r"has no config\.yaml, which says what model its check"):
        locate_model(ModelSpec(path=str(moved)))
    shutil.rmtree(run / "checkpoint-100")
    with pytest.raises(ModelError, match="neither finished nor saved a checkpoint"):
        locate_model(ModelSpec(path=str(run)))
    with pytest.raises(ModelError, match="neither finished nor saved a checkpoint"):
        SDXL(path=str(run)).check()


def test_a_checkpoint_of_another_model_is_refused(tiny_sdxl, tiny_sd15, tmp_path):
    run = tmp_path / "run"
    train(SDXL(path=str(tiny_sdxl)), run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["path"] = str(tiny_sd15)
    (run / "config.yaml").write_text(yaml.safe_dump(config))

    with pytest.raises(ModelError, match="the run started from another model"):
        load(SD15(path=str(run)))


def test_a_checkpoint_that_changed_on_the_disk_is_refused(tiny_sdxl, tmp_path):
    run = tmp_path / "run"
    train(SDXL(path=str(tiny_sdxl), lora=LORA), run)
    file = run / "checkpoint-200" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    with pytest.raises(ModelError, match="has changed since it was written"):
        SDXL(path=str(tiny_sdxl), lora=dataclasses.replace(LORA, start=run)).check()
    with pytest.raises(ModelError, match="has changed since it was written"):
        images(ModelSpec(path=str(run)))


# --- denoisers that are released alone ----------------------------------------------------------


@pytest.fixture
def moved_unet(tiny_sdxl, tmp_path) -> Path:
    """A folder that holds a `unet` and nothing else, with other weights."""
    folder = tmp_path / "release"
    shutil.copytree(tiny_sdxl / "unet", folder / "unet")
    (file,) = (folder / "unet").glob("*.safetensors")
    torch.manual_seed(0)
    tensors = {name: v + 0.05 * torch.randn_like(v) for name, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("form", ["folder", "inside", "file"])
def test_a_denoiser_alone_is_sampled_from_and_trained_from(tiny_sdxl, moved_unet, tmp_path, form):
    whole = Path(shutil.copytree(tiny_sdxl, tmp_path / "whole"))
    shutil.copytree(moved_unet / "unet", whole / "unet", dirs_exist_ok=True)
    unet = {
        "folder": moved_unet,
        "inside": moved_unet / "unet",
        "file": moved_unet / "unet/diffusion_pytorch_model.safetensors",
    }[form]
    settings = SDXL(path=str(tiny_sdxl), unet=str(unet))

    settings.check()
    model = load(settings)

    assert torch.equal(predict(model), predict(load(SDXL(path=str(whole)))))
    assert not torch.equal(predict(model), predict(load(SDXL(path=str(tiny_sdxl)))))
    released = ModelSpec(path=str(tiny_sdxl), unet=str(unet))
    assert torch.equal(images(released), images(ModelSpec(path=str(whole))))
    fingerprints = {
        locate_model(spec).fingerprint() for spec in (released, ModelSpec(path=str(tiny_sdxl)))
    }
    assert len(fingerprints) == 2
    run = tmp_path / "run"
    train(dataclasses.replace(settings, lora=LORA), run)
    opened = load(diffusion_settings(ModelSpec(path=str(run))), trainable=False)
    assert opened.fingerprint() != load(SDXL(path=str(tiny_sdxl), lora=LORA)).fingerprint()


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_file_of_a_denoiser_in_the_original_layout_is_read(tiny_sd15, tmp_path, prefix):
    file = write_single_file(tiny_sd15, tmp_path / "whole.safetensors")
    inside = "model.diffusion_model."
    unet = {
        prefix + name.removeprefix(inside): 2 * value
        for name, value in load_file(file).items()
        if name.startswith(inside)
    }
    save_file(unet, tmp_path / "unet.safetensors")
    settings = SD15(path=str(tiny_sd15), unet=str(tmp_path / "unet.safetensors"))
    settings.check()

    ours = dict(load(settings).network.named_parameters())

    for name, value in load(SD15(path=str(tiny_sd15))).network.named_parameters():
        torch.testing.assert_close(ours[name], 2 * value)


def test_a_denoiser_that_is_none_or_does_not_fit_is_refused(tiny_sdxl, tiny_sd15, tmp_path):
    with pytest.raises(ModelError, match=r"unet: .*tokenizer has no ./config\.json"):
        SDXL(path=str(tiny_sdxl), unet=str(tiny_sdxl / "tokenizer")).check()
    with pytest.raises(ModelError, match="addition_embed_type None"):
        SDXL(path=str(tiny_sdxl), unet=str(tiny_sd15)).check()
    other = tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ModelError, match="does not hold the weights of the UNet2DConditionModel"):
        load(SDXL(path=str(tiny_sdxl), unet=str(other)))
    with pytest.raises(ModelError, match=r"holds a denoiser alone: give it as unet"):
        release = Path(shutil.copytree(tiny_sdxl / "unet", tmp_path / "release" / "unet")).parent
        locate_model(ModelSpec(path=str(release)))
    (release / "unet").rename(release / "other")
    (release / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ModelError, match=r"a llava of transformers, which does not make images"):
        locate_model(ModelSpec(path=str(release)))


# --- adapters that change more than the denoiser --------------------------------------------------


@pytest.mark.parametrize("name", ["text_encoder.layers.0.q_proj.lora_A.weight", "stray"])
def test_a_start_that_changes_more_than_is_trained_is_refused(tiny_sdxl, tmp_path, name):
    model = load(SDXL(path=str(tiny_sdxl), lora=LORA))
    model.export(tmp_path / "adapter")
    (file,) = (tmp_path / "adapter").glob("pytorch_lora_weights.safetensors")
    save_file({**load_file(file), name: torch.ones(2, 8)}, file)
    settings = SDXL(path=str(tiny_sdxl), lora=dataclasses.replace(LORA, start=file))

    with pytest.raises(ModelError, match=r"also changes what no training here does .*Merge"):
        settings.check()
