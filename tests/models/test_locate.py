from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from diffalign.errors import ModelError
from diffalign.models.locate import locate
from diffalign.models.locations import ITSELF, Folder, Hub
from diffalign.models.single_file import SingleFile


@pytest.fixture
def copied(tiny_sdxl, tmp_path):
    """A model folder that a test may damage."""
    return shutil.copytree(tiny_sdxl, tmp_path / "model")


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    return path


def test_a_folder_a_file_and_a_hub_id_are_told_apart(tiny_sdxl, checkpoint):
    hub = locate("stabilityai/stable-diffusion-xl-base-1.0", revision="abc", variant="fp16")

    assert locate(str(tiny_sdxl)) == Folder(tiny_sdxl)
    assert hub == Hub("stabilityai/stable-diffusion-xl-base-1.0", "abc", "fp16")
    assert locate(str(checkpoint), config=str(tiny_sdxl)) == SingleFile(
        checkpoint, Folder(tiny_sdxl)
    )


def test_a_missing_folder_is_refused_with_the_nearest_name(tiny_sdxl):
    with pytest.raises(ModelError, match=r"there is no .*sdxll.* Did you mean .*sdxl\?"):
        locate(str(tiny_sdxl) + "l")


def test_a_relative_path_whose_parent_exists_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()

    with pytest.raises(ModelError, match="there is no models/sdxl"):
        locate("models/sdxl")


def test_a_file_of_weights_that_is_missing_is_no_hub_id():
    with pytest.raises(ModelError, match=r"there is no nowhere/model\.safetensors"):
        locate("nowhere/model.safetensors")


def test_a_folder_that_is_no_model_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("")

    with pytest.raises(ModelError, match=r"has no model_index\.json \(it holds: notes\.txt\)"):
        locate(str(tmp_path)).read_json("model_index.json")


def test_a_damaged_configuration_is_named(copied):
    (copied / "model_index.json").write_text("{")

    with pytest.raises(ModelError, match=r"model_index\.json is not JSON"):
        locate(str(copied)).read_json("model_index.json")


def test_pickled_weights_are_refused_unless_allowed(copied):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()

    locate(str(copied), allow_pickle=True).check_weights("unet")
    with pytest.raises(ModelError, match=r"holds diffusion_pytorch_model\.bin: a pickle.*Convert"):
        locate(str(copied)).check_weights("unet")


def test_a_missing_variant_is_refused_naming_the_files(copied):
    with pytest.raises(ModelError, match=r"no \*\.fp16\.safetensors.*diffusion_pytorch_model"):
        locate(str(copied), variant="fp16").check_weights("unet")


def test_a_pickled_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"")

    with pytest.raises(ModelError, match=r"model\.ckpt: a pickle, which a trusting reader would"):
        locate(str(path), config="owner/name")


def test_a_single_file_needs_a_configuration(checkpoint):
    with pytest.raises(ModelError, match=r"holds no configuration\. Set config to a diffusers"):
        locate(str(checkpoint))


def test_settings_that_a_folder_has_no_use_for_are_refused(tiny_sdxl):
    with pytest.raises(ModelError, match=r"revision is 'main', but .* is a local folder"):
        locate(str(tiny_sdxl), revision="main")
    with pytest.raises(ModelError, match=r"config is 'owner/name', but .* is no single checkpoint"):
        locate(str(tiny_sdxl), config="owner/name")


def test_what_the_hub_refuses_becomes_a_sentence(monkeypatch):
    def refuse(*_, **__):
        raise OSError("401 Client Error\nlong trace")

    monkeypatch.setattr("diffalign.models.locations.hf_hub_download", refuse)

    message = r"cannot get model_index\.json of owner/name at revision r1 from the hub: 401 Client"
    with pytest.raises(ModelError, match=message):
        locate("owner/name", revision="r1").read_json("model_index.json")


def test_the_commit_identifies_a_model_of_the_hub(monkeypatch):
    path = "hub/models--owner--name/snapshots/c0ffee/model_index.json"
    monkeypatch.setattr("diffalign.models.locations.try_to_load_from_cache", lambda *_, **__: path)

    assert locate("owner/name").identity("unet").startswith("owner/name@c0ffee/unet")


def test_a_lone_network_of_the_hub_is_asked_for_its_own_configuration(monkeypatch, tmp_path):
    asked = []
    (tmp_path / "config.json").write_text("{}")

    def response(name, file, *, revision):
        asked.append((name, file, revision))
        return str(tmp_path / file)

    for function in ("hf_hub_download", "try_to_load_from_cache"):
        monkeypatch.setattr(f"diffalign.models.locations.{function}", response)
    network = locate("owner/vae", revision="r1")
    network.read_json(f"{ITSELF}/config.json")
    network.identity(ITSELF)

    assert asked == [("owner/vae", "config.json", "r1")] * 2


def test_one_changed_weight_matrix_changes_the_identity(copied):
    location = locate(str(copied))
    before = location.identity("unet")
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)

    save_file({name: value + 1e-3 for name, value in weights.items()}, file)

    assert location.identity("unet") != before
    assert location.identity("vae") == locate(str(copied)).identity("vae")


@pytest.mark.parametrize("tensor", ["first", "middle", "last"])
def test_every_part_of_a_large_file_counts_for_its_identity(tmp_path, tiny_sdxl, tensor):
    weights = {name: torch.zeros(2**18) for name in ("first", "middle", "last")}
    file = tmp_path / "model.safetensors"
    save_file(weights, file)
    location = locate(str(file), config=str(tiny_sdxl))
    before = location.identity("unet")

    save_file({**weights, tensor: torch.ones(2**18)}, file)

    assert location.identity("unet") != before


def test_what_is_stored_in_half_precision_is_read_in_float32(copied):
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (file,) = (copied / name).glob("*.safetensors")
        half = {key: value.half() for key, value in load_file(file).items()}
        save_file(half, file, metadata={"format": "pt"})
        config = json.loads((copied / name / "config.json").read_text())
        config |= {"dtype": "float16"} if "dtype" in config else {}
        (copied / name / "config.json").write_text(json.dumps(config))

    pipeline = locate(str(copied)).load(StableDiffusionXLPipeline)

    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert [network.dtype for network in networks] == [torch.float32] * 4


def test_a_single_file_is_read_with_the_configuration_it_was_given(checkpoint, tiny_sdxl):
    class Pipeline:
        def __init__(self, path, options):
            self.path, self.options, self.components = path, options, {}

        @classmethod
        def from_single_file(cls, path, **options):
            return cls(path, options)

    location = locate(str(checkpoint), config=str(tiny_sdxl))
    pipeline = location.load(Pipeline, vae=None)

    assert pipeline.path == str(checkpoint)
    assert pipeline.options == {"config": str(tiny_sdxl), "local_files_only": True, "vae": None}
    assert location.read_json("model_index.json") == json.loads(
        (tiny_sdxl / "model_index.json").read_text()
    )
