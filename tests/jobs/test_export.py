"""`diffalign export`: what was written, opened again by the libraries that read it, and the images
that it makes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import diffusers
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffalign import config
from diffalign.errors import ConfigError, ModelError
from diffalign.jobs import export, train
from diffalign.jobs.export import ExportConfig
from diffalign.models.kohya import KOHYA_FILE
from diffalign.training.build import RunConfig
from tests import layouts, original_names
from tests.tiny_models import write_sd15, write_sdxl

SMOKE = Path(__file__).parents[2] / "configs/smoke/diffusion_dpo_sdxl.yaml"
ALL = (
    "targets: [to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2, proj_in, proj_out, conv1, "
    "conv2, conv_shortcut, time_emb_proj, conv, conv_in, conv_out, linear_1, linear_2]"
)
ADAPTERS = {
    "alpha": "{rank: 4, alpha: 6}",
    "rslora": "{rank: 4, alpha: 6, rslora: true}",
    "dora": "{rank: 4, alpha: 6, dora: true}",
    "all": f"{{rank: 2, alpha: 3, {ALL}}}",
    "all_dora": f"{{rank: 2, alpha: 3, dora: true, {ALL}}}",
    "weights": "null",
}
KNOWN = {"sd15": original_names.TINY_SD15, "sdxl": original_names.TINY_SDXL}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "sd15": write_sd15(folder / "sd15"),
        "sd2": write_sd15(folder / "sd2", prediction_type="v_prediction", hidden_act="gelu"),
        "sdxl": write_sdxl(folder / "sdxl", second_width=16),
        "sdxl_v": write_sdxl(folder / "sdxl_v", second_width=16, prediction_type="v_prediction"),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, models):
    """Trains a model once: two steps, far enough to be seen."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "data"
    layouts.write_pickapic(data, layouts.make_pairs(4))
    made: dict[tuple[str, str], Path] = {}

    def run(name: str, adapter: str) -> Path:
        output = folder / f"{name} {adapter}"
        if (name, adapter) not in made:
            train.run(
                config.load(
                    RunConfig,
                    SMOKE,
                    [
                        f"model.path={models[name]}",
                        f"model.kind={'sdxl' if 'xl' in name else 'sd15'}",
                        f"model.lora={ADAPTERS[adapter]}",
                        f"data.path={data}",
                        "data.resolution=32",
                        f"output={output}",
                        "optimizer.lr=0.1",
                        "training.checkpoint_every=1",
                    ],
                )
            )
            made[name, adapter] = output
        return output

    return run


def pipeline_class(name):
    return getattr(
        diffusers, "StableDiffusionXLPipeline" if "xl" in name else "StableDiffusionPipeline"
    )


def opened(name, path, **options):
    parts = {} if "xl" in name else {"safety_checker": None}
    return pipeline_class(name).from_pretrained(path, **parts, **options)


def image(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red thing",
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images[0]


def trained_image(name, models, run):
    """Of what the run wrote for diffusers."""
    if (run / "final/model_index.json").is_file():
        return image(opened(name, run / "final"))
    base = opened(name, models[name])
    before = image(base)
    base.load_lora_weights(run / "final", weight_name="pytorch_lora_weights.safetensors")
    after = image(base)
    assert (before - after).abs().max() > 5 / 255, "nothing to see"
    return after


def same(first, second) -> bool:
    return bool((first - second).abs().max() <= 1 / 255)


def exported(run, **changes) -> Path:
    return export.run(ExportConfig(run=run, **changes))


def under_comfyui(name, models, file):
    """The base with a LoRA as ComfyUI's rules apply it; every key of the file is used."""
    pipeline = opened(name, models[name])
    tensors, key_map = load_file(file), original_names.comfyui_key_map(KNOWN[name])
    originals = {original: ours for ours, original in KNOWN[name].items()}
    layers = {key.partition(".")[0] for key in tensors}
    assert layers <= key_map.keys()
    for layer in layers:
        module = pipeline.unet.get_submodule(originals[key_map[layer]])
        module.weight.data = original_names.comfyui_weight(module.weight.data, tensors, layer)
    return image(pipeline)


@pytest.mark.parametrize("adapter", ["alpha", "rslora", "dora", "all", "all_dora"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_lora_makes_the_same_image_in_diffusers_and_by_comfyuis_rules(
    name, adapter, models, runs, tmp_path
):
    run = runs(name, adapter)
    expected = trained_image(name, models, run)
    files = [run / "final" / KOHYA_FILE, exported(run, output=tmp_path / "x.safetensors")]
    for file in files:
        assert same(under_comfyui(name, models, file), expected)
        if "dora" not in adapter:  # whose magnitudes diffusers drops, with a warning
            pipeline = opened(name, models[name])
            pipeline.load_lora_weights(file.parent, weight_name=file.name)
            assert same(image(pipeline), expected)
    folder = exported(run, form="diffusers", output=tmp_path / "folder")
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        KOHYA_FILE,
        "pytorch_lora_weights.safetensors",
    ]
    pipeline = opened(name, models[name])
    pipeline.load_lora_weights(folder)
    assert same(image(pipeline), expected)


@pytest.mark.parametrize("adapter", ["alpha", "all_dora", "weights"])
@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl", "sdxl_v"])
def test_a_merged_model_makes_the_same_image_as_folder_and_as_single_file(
    name, adapter, models, runs, tmp_path
):
    run = runs(name, adapter)
    expected = trained_image(name, models, run)
    folder = exported(run, form="folder", output=tmp_path / "folder")
    assert same(image(opened(name, folder)), expected)
    file = exported(run, form="single_file", output=tmp_path / "x.safetensors")
    single = pipeline_class(name).from_single_file(str(file), config=str(models[name]))
    assert same(image(single), expected)
    markers = {"v_pred", "ztsnr"} & load_file(file).keys()
    assert markers == ({"v_pred", "ztsnr"} if name == "sdxl_v" else set())
