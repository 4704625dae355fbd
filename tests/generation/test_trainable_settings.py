from __future__ import annotations

import json
import shutil

import pytest

from diffalign.errors import ModelError
from diffalign.generation.models import ModelSpec
from diffalign.generation.trainable_settings import diffusion_settings
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL


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
    with pytest.raises(ModelError, match=r"FluxPipeline, whose trajectories .*StableDiffusionXL"):
        diffusion_settings(ModelSpec(path=str(folder)))


def test_a_run_that_has_saved_nothing_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {path: x}\n")
    with pytest.raises(
        ModelError, match=r"neither finished nor saved a checkpoint\. Continue it with: diffalign"
    ):
        diffusion_settings(ModelSpec(path=str(tmp_path)))
