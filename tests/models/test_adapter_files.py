from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from diffalign.errors import ModelError
from diffalign.models.adapter_files import ADAPTER_FILE, locate_adapter, read_adapter

LAYER = "unet.down.to_q"


def write(path, names=(f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"), **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.ones(2, 2) for name in names}, path, metadata=metadata)
    return path


def test_a_file_a_folder_and_a_run_name_the_same_adapter(tmp_path):
    file = write(tmp_path / "run/final" / ADAPTER_FILE)
    assert locate_adapter(file) == file
    assert locate_adapter(tmp_path / "run/final") == file
    assert locate_adapter(tmp_path / "run") == file


def test_a_folder_may_hold_one_file_of_any_name_but_not_two(tmp_path):
    first = write(tmp_path / "one.safetensors")
    assert locate_adapter(tmp_path) == first
    write(tmp_path / "two.safetensors")
    with pytest.raises(ModelError, match=r"found one\.safetensors, two\.safetensors"):
        locate_adapter(tmp_path)


def test_what_is_no_adapter_is_refused(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/model_index.json").touch()
    with pytest.raises(ModelError, match="a whole model and no adapter"):
        locate_adapter(tmp_path / "whole")
    with pytest.raises(ModelError, match="there is no such adapter"):
        locate_adapter(tmp_path / "nothing.safetensors")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="never from pickles"):
        locate_adapter(tmp_path / "x.bin")


def test_tensors_of_the_network_come_without_its_name(tmp_path):
    names = (f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", "text_encoder.q.lora_A.weight")
    adapter = read_adapter(write(tmp_path / "x.safetensors", names), component="unet")
    assert set(adapter.tensors) == {"down.to_q.lora_A.weight", "down.to_q.lora_B.weight"}
    assert adapter.others == ("text_encoder.q.lora_A.weight",)
    assert adapter.scale == 1.0


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"text_encoder.r": 4, "text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_a_scale_in_the_header_counts(tmp_path, settings, scale):
    file = write(tmp_path / "x.safetensors", lora_adapter_metadata=json.dumps(settings))
    assert read_adapter(file, component="unet").scale == scale


def test_another_layout_is_refused_naming_the_way_out(tmp_path):
    file = write(tmp_path / "x.safetensors", ("lora_unet_down_to_q.lora_down.weight",))
    with pytest.raises(ModelError, match=r"first is lora_unet_down_to_q.*save_lora_weights"):
        read_adapter(file, component="unet")


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ModelError, match="cannot be read as an adapter"):
        read_adapter(tmp_path / "x.safetensors", component="unet")
