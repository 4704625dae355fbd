"""Settings of a diffusion model: what is refused before weights are read, and what is loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file

from diffalign import components
from diffalign.errors import ModelError
from diffalign.models import lora
from diffalign.models.base import AbstractModel
from diffalign.models.diffusion.noising import Epsilon, Velocity
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.locations import Folder
from diffalign.models.lora import LoraSettings
from tests.original_layout import write_single_file

CPU = torch.device("cpu")
SDXL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def load(settings, *, dtype=torch.float32, reference="none", **further):
    return settings.load(device=CPU, compute_dtype=dtype, reference=reference, **further)


@pytest.fixture
def copied(tiny_sdxl, tmp_path):
    """A model folder that a test may damage."""
    return shutil.copytree(tiny_sdxl, tmp_path / "model")


def test_both_backbones_are_kinds():
    assert {"sd15", "sdxl"} <= set(components.kinds(AbstractModel))
    assert components.kind_of(SDXL(path="owner/name")) == "sdxl"


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_a_sound_folder_passes_all_checks(tiny_sdxl, tiny_sd15_v, lora):
    SDXL(path=str(tiny_sdxl), lora=lora).check()
    SD15(path=str(tiny_sd15_v), lora=lora).check()


def test_a_folder_of_another_architecture_is_refused_naming_both(tiny_sdxl):
    message = "holds a StableDiffusionXLPipeline, but kind sd15 trains a StableDiffusionPipeline"

    with pytest.raises(ModelError, match=f"{message}: set kind to sdxl"):
        SD15(path=str(tiny_sdxl)).check()


def test_a_folder_without_a_unet_is_refused(copied):
    shutil.rmtree(copied / "unet")

    with pytest.raises(ModelError, match=r"has no unet/config\.json \(it holds: model_index"):
        SDXL(path=str(copied)).check()


def test_a_folder_without_weights_is_refused(copied):
    (copied / "text_encoder_2" / "model.safetensors").unlink()

    with pytest.raises(ModelError, match="text_encoder_2 has no weights"):
        SDXL(path=str(copied)).check()


def test_an_unknown_network_class_is_refused(copied):
    (copied / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet9D"}))

    with pytest.raises(ModelError, match=r"names the class 'UNet9D', which diffusers .* lacks"):
        SDXL(path=str(copied)).check()


def test_an_unknown_prediction_type_is_refused(copied):
    (copied / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDIMScheduler", "prediction_type": "sample"})
    )

    with pytest.raises(ModelError, match="has prediction_type 'sample'"):
        SDXL(path=str(copied)).check()


def test_an_adapter_for_layers_that_do_not_exist_is_refused(tiny_sdxl):
    with pytest.raises(ModelError, match=r"lora\.targets names 'qkv'"):
        SDXL(path=str(tiny_sdxl), lora=LoraSettings(targets=("qkv",))).check()


def test_a_missing_extra_is_refused_naming_it(tiny_sdxl, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ModelError, match=r"pip install 'diffalign\[xformers\]'"):
        SDXL(path=str(tiny_sdxl), attention="xformers").check()


def test_xformers_without_a_cuda_device_is_refused(tiny_sdxl, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ModelError, match="needs a CUDA device, and this machine has none"):
        SDXL(path=str(tiny_sdxl), attention="xformers").check()


def test_an_adapter_that_is_not_there_cannot_be_switched_off(tiny_sdxl):
    with pytest.raises(ModelError, match="adapter_off needs an adapter, and lora is null"):
        load(SDXL(path=str(tiny_sdxl)), reference="adapter_off")


def test_damaged_weights_become_a_sentence(copied):
    (copied / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")

    with pytest.raises(ModelError, match=r"unet/diffusion_pytorch.*: cannot be read as safe"):
        load(SDXL(path=str(copied)))


def test_noising_follows_the_models_own_schedule(tiny_sdxl, tiny_sdxl_v):
    assert isinstance(SDXL(path=str(tiny_sdxl)).noising(), Epsilon)
    velocity = SDXL(path=str(tiny_sdxl_v)).noising()
    assert isinstance(velocity, Velocity)
    assert velocity.alphas_cumprod[-1] == 0
    assert SDXL(path=str(tiny_sdxl)).noising().alphas_cumprod[-1] > 0
    override = SDXL(path=str(tiny_sdxl), prediction_type="v_prediction").noising()
    assert isinstance(override, Velocity)


def test_noising_and_checks_read_no_weights(copied):
    for file in copied.rglob("*.safetensors"):
        file.write_bytes(b"")

    settings = SDXL(path=str(copied), lora=LoraSettings())
    settings.check()

    assert settings.noising().schedule_length == 1000


def test_trained_weights_are_float32_and_the_frozen_ones_of_the_compute_dtype(tiny_sdxl):
    adapter = load(SDXL(path=str(tiny_sdxl), lora=LoraSettings(rank=2)), dtype=torch.bfloat16)
    full = load(SDXL(path=str(tiny_sdxl)), dtype=torch.bfloat16)

    assert {p.dtype for _, p in adapter.trained_parameters()} == {torch.float32}
    assert {p.dtype for _, p in full.trained_parameters()} == {torch.float32}
    assert adapter.network.conv_in.weight.dtype == torch.bfloat16
    assert adapter.network.conv_norm_out.weight.dtype == torch.float32
    assert all(
        p.dtype == torch.bfloat16 and not p.requires_grad
        for encoder in adapter.prompts.conditioner.text_encoders
        for p in encoder.parameters()
    )
    assert all(
        p.dtype == torch.float32 and not p.requires_grad
        for p in adapter.autoencoder.network.parameters()
    )


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_what_is_only_evaluated_takes_the_memory_of_what_is_frozen(tiny_sdxl, lora):
    settings = SDXL(path=str(tiny_sdxl), lora=lora)
    network = load(settings, dtype=torch.bfloat16, trainable=False).network

    assert not any(p.requires_grad for p in network.parameters())
    assert network.conv_in.weight.dtype == torch.bfloat16


def test_without_an_adapter_every_weight_of_the_network_trains(tiny_sd15):
    model = load(SD15(path=str(tiny_sd15)))

    assert [name for name, _ in model.trained_parameters()] == [
        name for name, _ in model.network.named_parameters()
    ]


def test_another_autoencoder_takes_the_place_of_the_models_own(tiny_sdxl, tmp_path):
    other = AutoencoderKL.from_pretrained(tiny_sdxl / "vae")
    other.register_to_config(scaling_factor=0.25)
    other.save_pretrained(tmp_path / "vae")

    model = load(SDXL(path=str(tiny_sdxl), vae=str(tmp_path / "vae"), vae_dtype="bf16"))

    assert model.autoencoder.network.config.scaling_factor == 0.25
    assert model.autoencoder.network.dtype == torch.bfloat16


@pytest.fixture
def autoencoder(tiny_sdxl, tmp_path):
    """The folder of an autoencoder that a test may damage."""
    return shutil.copytree(tiny_sdxl / "vae", tmp_path / "vae")


def test_another_autoencoder_is_checked_before_weights_are_read(tiny_sdxl, autoencoder):
    settings = SDXL(path=str(tiny_sdxl), vae=str(autoencoder))
    settings.check()

    with pytest.raises(ModelError, match=r"vae: there is no .*vaee.* Did you mean .*vae\?"):
        SDXL(path=str(tiny_sdxl), vae=f"{autoencoder}e").check()
    with pytest.raises(ModelError, match=r"vae: revision is 'main', but .* is a local folder"):
        SDXL(path=str(tiny_sdxl), vae=str(autoencoder), vae_revision="main").check()
    with pytest.raises(ValueError, match="vae_revision is 'main', but vae is null"):
        SDXL(path=str(tiny_sdxl), vae_revision="main")
    (autoencoder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"vae: .* has no weights"):
        settings.check()


def test_a_damaged_autoencoder_becomes_a_sentence(tiny_sdxl, autoencoder):
    (autoencoder / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")

    with pytest.raises(ModelError, match="vae: cannot read an autoencoder from"):
        load(SDXL(path=str(tiny_sdxl), vae=str(autoencoder)))


def test_the_fingerprint_follows_the_content_of_another_autoencoder(
    tiny_sdxl, autoencoder, tmp_path
):
    moved = shutil.copytree(autoencoder, tmp_path / "moved")
    before = SDXL(path=str(tiny_sdxl), vae=str(autoencoder))._fingerprint()

    assert SDXL(path=str(tiny_sdxl), vae=str(moved))._fingerprint() == before
    network = AutoencoderKL.from_pretrained(moved)
    network.encoder.conv_in.bias.data += 1e-3
    network.save_pretrained(moved)
    assert SDXL(path=str(tiny_sdxl), vae=str(moved))._fingerprint() != before


def test_the_fingerprint_tells_weights_and_shapes_of_training_apart(tiny_sdxl, tiny_sdxl_v, copied):
    unet = UNet2DConditionModel.from_pretrained(copied / "unet")
    unet.conv_in.bias.data += 1e-3
    unet.save_pretrained(copied / "unet")
    full, adapter = SDXL(path=str(tiny_sdxl)), LoraSettings(rank=2)

    prints = [
        load(settings).fingerprint()
        for settings in (
            full,
            SDXL(path=str(tiny_sdxl), lora=adapter),
            SDXL(path=str(tiny_sdxl), lora=LoraSettings(rank=3)),
            SDXL(path=str(copied)),
        )
    ]

    assert len(set(prints)) == 4
    assert load(SDXL(path=f"{tiny_sdxl}/")).fingerprint() == prints[0]


def test_a_single_file_holds_the_same_model_as_its_folder(tiny_sd15, tmp_path):
    file = write_single_file(tiny_sd15, tmp_path / "model.safetensors")
    settings = SD15(path=str(file), config=str(tiny_sd15), prediction_type="v_prediction")
    settings.check()
    model, expected = load(settings), load(SD15(path=str(tiny_sd15)))

    assert isinstance(model.noising, Velocity)
    for ours, theirs in [
        (model.network, expected.network),
        (model.autoencoder.network, expected.autoencoder.network),
        (model.prompts.conditioner.text_encoder, expected.prompts.conditioner.text_encoder),
    ]:
        weights = ours.state_dict()
        assert all(torch.equal(weights[name], v) for name, v in theirs.state_dict().items())

    model.export(tmp_path / "final")
    names = load_file(tmp_path / "final" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    exported = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "final")
    assert exported.scheduler.config.prediction_type == "v_prediction"
    weights = exported.text_encoder.state_dict()
    assert all(
        torch.equal(weights[name], value)
        for name, value in expected.prompts.conditioner.text_encoder.state_dict().items()
    )


def test_an_export_asks_for_no_part_that_was_left_out_at_load(tiny_sd15, tmp_path, monkeypatch):
    model = load(SD15(path=str(tiny_sd15)))
    asked = []
    read = Folder.load

    def spy(location, pipeline, **components):
        asked.append(components)
        return read(location, pipeline, **components)

    monkeypatch.setattr(Folder, "load", spy)
    model.export(tmp_path / "final")

    assert asked[-1].items() >= SD15.left_out.items()


def test_a_single_file_that_lacks_a_part_becomes_a_sentence(tiny_sd15, tmp_path):
    file = tmp_path / "model.safetensors"
    shutil.copy(tiny_sd15 / "unet" / "diffusion_pytorch_model.safetensors", file)

    with pytest.raises(ModelError, match="does not hold the weights of the AutoencoderKL"):
        load(SD15(path=str(file), config=str(tiny_sd15)))


def test_the_real_sdxl_is_questioned_without_its_weights(copied):
    (copied / "unet" / "config.json").write_text(json.dumps(SDXL_UNET))

    network = SDXL(path=str(copied)).parts.blank_network()
    lora.check_targets(network, LoraSettings())
    lora.attach(network.requires_grad_(False), LoraSettings())

    assert all(parameter.is_meta for parameter in network.parameters())
    sizes = [p.numel() for p in network.parameters() if not p.requires_grad]
    assert sum(sizes) == 2_567_463_684
    blocks = 70  # transformer blocks: 2 x 2 + 2 x 10 down, 10 in the middle, 3 x 10 + 3 x 2 up
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert len(trained) == blocks * 2 * 4 * 2  # attentions, targets, factors


def test_networks_are_compiled_in_place_so_that_names_stay(tiny_sd15, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))

    plain = load(SD15(path=str(tiny_sd15)), reference="frozen_copy")
    assert compiled == []
    model = load(SD15(path=str(tiny_sd15), compile=True), reference="frozen_copy")

    assert compiled[0] is model.network
    assert len(compiled) == 2  # or policy and reference would round differently
    assert [n for n, _ in model.trained_parameters()] == [n for n, _ in plain.trained_parameters()]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_the_line_at_the_start_of_a_run_says_what_trains(tiny_sd15, lora):
    line = SD15(path=str(tiny_sd15), lora=lora).describe()

    assert line == f"sd15 from {tiny_sd15}, training " + (
        "all weights" if lora is None else "LoRA of rank 2"
    )


class _Command:
    """Runs a command where a pickle of it is read with trust."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_that_is_allowed_gives_tensors_and_runs_nothing(tiny_sd15, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd15, folder)
    (weights,) = (folder / "unet").glob("*.safetensors")
    pickled = weights.with_suffix(".bin")
    torch.save(load_file(weights), pickled)
    weights.unlink()
    load(SD15(path=str(folder), allow_pickle=True))

    torch.save({"conv_in.weight": _Command(tmp_path / "ran")}, pickled)
    with pytest.raises(ModelError):
        load(SD15(path=str(folder), allow_pickle=True))
    assert not (tmp_path / "ran").exists()
