"""Models that are found: to sample images from, and to train on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

from diffalign.errors import ModelError
from diffalign.generation.models import ModelSpec, diffusion_settings, locate_model
from diffalign.models.adapter_files import ADAPTER_FILE
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from tests.generation.opened import SEEDS, TEXTS, change_weights, open_model, write_adapter


@pytest.fixture
def moved_sdxl(tiny_sdxl, tmp_path) -> Path:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "moved"))
    change_weights(folder)
    return folder


@pytest.fixture
def adapter(tiny_sdxl, tmp_path) -> Path:
    return write_adapter(tiny_sdxl, tmp_path / "adapter")


def test_prompts_that_are_cut_are_known(tiny_sdxl):
    model = locate_model(ModelSpec(path=str(tiny_sdxl)))
    assert model.truncated(["ab", "a very long prompt"]) == ["a very long prompt"]


@pytest.mark.parametrize("form", ["folder", "file", "run"])
def test_an_adapter_is_found_wherever_it_lies(tiny_sdxl, adapter, tmp_path, form):
    if form == "run":
        run = tmp_path / "run"
        shutil.copytree(adapter, run / "final")
        config = {"model": {"kind": "sdxl", "path": str(tiny_sdxl), "revision": None}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        spec = ModelSpec(path=str(run))
    else:
        lora = adapter if form == "folder" else next(adapter.glob("*.safetensors"))
        spec = ModelSpec(path=str(tiny_sdxl), lora=lora)
    generated = open_model(spec).generate(TEXTS, SEEDS)

    plain = open_model(tiny_sdxl)
    assert (generated - plain.generate(TEXTS, SEEDS)).abs().max() > 1e-3
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    # The file is named since diffusers 0.33 looks for none where the network is off.
    pipeline.load_lora_weights(str(adapter), weight_name=ADAPTER_FILE)
    plain.model = dataclasses.replace(plain.model, network=pipeline.unet)
    torch.testing.assert_close(generated, plain.generate(TEXTS, SEEDS), atol=1e-3, rtol=0)


def test_an_adapter_is_generated_with_the_prediction_type_that_its_run_trained(
    tiny_sdxl, adapter, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "final")
    model = {"kind": "sdxl", "path": str(tiny_sdxl), "prediction_type": "v_prediction"}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    spec, plain = (
        ModelSpec(path=str(run)),
        ModelSpec(path=str(tiny_sdxl), lora=adapter),
    )

    scheduler = open_model(spec, scheduler="DDIM").scheduler

    assert scheduler.config.prediction_type == "v_prediction"
    assert locate_model(spec).fingerprint() != locate_model(plain).fingerprint()


def test_damaged_weights_become_a_sentence(moved_sdxl):
    (moved_sdxl / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"unet/diffusion_pytorch.*: cannot be read as safe"):
        open_model(moved_sdxl)


def test_the_result_of_a_full_run_is_generated_with(moved_sdxl, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(moved_sdxl, run / "final")
    (run / "config.yaml").write_text("model: {kind: sdxl, path: elsewhere}\n")
    expected = open_model(moved_sdxl).generate(["a"], [0])
    assert torch.equal(open_model(run).generate(["a"], [0]), expected)


def test_fingerprints_follow_the_weights_and_not_the_place(
    tiny_sdxl, tiny_sdxl_v, adapter, tmp_path
):
    copy = Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))
    base = ModelSpec(path=str(tiny_sdxl))

    def fingerprint(spec: ModelSpec) -> str:
        return locate_model(spec).fingerprint()

    assert fingerprint(ModelSpec(path=str(copy))) == fingerprint(base)
    others = [
        fingerprint(ModelSpec(path=str(tiny_sdxl_v))),
        fingerprint(ModelSpec(path=str(tiny_sdxl), lora=adapter)),
    ]
    for component in ("unet", "text_encoder_2", "vae"):
        change_weights(copy, component=component)
        others.append(fingerprint(ModelSpec(path=str(copy))))
    assert len({fingerprint(base), *others}) == 6


@pytest.mark.parametrize(
    ("files", "lora", "message"),
    [
        (["config.yaml"], None, "neither finished nor saved a checkpoint.*--resume"),
        (["pytorch_lora_weights.safetensors"], None, "is an adapter: give it as lora"),
        (["unet/config.json"], None, "has no model_index.json"),
        (["lora.bin"], "lora.bin", "read from .safetensors only, never from pickles"),
        ([], "nowhere.safetensors", "there is no such adapter"),
        (["l/a.safetensors", "l/b.safetensors"], "l", "found a.safetensors, b.safetensors"),
    ],
)
def test_what_is_no_model_is_refused_with_advice(tmp_path, files, lora, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}" if name.endswith(".json") else "")
    with pytest.raises(ModelError, match=message):
        locate_model(ModelSpec(path=str(tmp_path), lora=lora and tmp_path / lora))


def test_an_adapter_of_another_model_is_refused(tiny_sdxl, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"text_encoder_7.layer.lora_A.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ModelError, match=r"other\.safetensors"):
        open_model(ModelSpec(path=str(tiny_sdxl), lora=file))


# --- to train on --------------------------------------------------------------------------------


def test_the_backbone_is_that_of_the_folder(tiny_sd15, tiny_sdxl_v):
    assert diffusion_settings(ModelSpec(path=str(tiny_sd15))) == SD15(path=str(tiny_sd15))
    assert diffusion_settings(ModelSpec(path=str(tiny_sdxl_v))) == SDXL(path=str(tiny_sdxl_v))


def test_a_prediction_type_in_place_of_the_folders_own_is_kept(tiny_sd15):
    spec = ModelSpec(path=str(tiny_sd15), prediction_type="v_prediction")
    assert diffusion_settings(spec).prediction_type == "v_prediction"


def test_a_pipeline_of_another_kind_is_refused(tiny_sd15, tmp_path):
    folder = shutil.copytree(tiny_sd15, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "FluxPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    for find in (diffusion_settings, locate_model):
        with pytest.raises(ModelError, match=r"FluxPipeline, from which no .*StableDiffusionXL"):
            find(ModelSpec(path=str(folder)))


def test_a_run_that_has_saved_nothing_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {path: x}\n")
    with pytest.raises(
        ModelError, match=r"neither finished nor saved a checkpoint\. Continue it with: diffalign"
    ):
        diffusion_settings(ModelSpec(path=str(tmp_path)))
