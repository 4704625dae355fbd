"""Weights straight into the precision in which they are kept: bit for bit what diffusers reads in
float32 and rounds afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffalign.errors import ModelError
from diffalign.models import devices, lora, weights
from diffalign.models.diffusion.sd3 import SD3
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.locations import Folder
from diffalign.models.lora import LoraSettings
from diffalign.models.reference import FrozenCopy
from tests.original_layout import write_single_file
from tests.tiny_models import write_sd3

CPU = torch.device("cpu")
BF16 = torch.bfloat16
LORA = LoraSettings(rank=2)
DORA = LoraSettings(rank=2, dora=True, init="kaiming", seed=3)


@pytest.fixture(scope="module")
def half_sdxl(tiny_sdxl, tmp_path_factory) -> Path:
    """A folder as it is released: fp16, and the network in several files."""
    folder = shutil.copytree(tiny_sdxl, tmp_path_factory.mktemp("half") / "sdxl")
    network = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    network.half().save_pretrained(folder / "unet", max_shard_size="30KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    AutoencoderKL.from_pretrained(folder / "vae").half().save_pretrained(folder / "vae")
    for name, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        where = folder / f"text_encoder{name}"
        kind.from_pretrained(where).half().save_pretrained(where)
    return folder


def load(settings, dtype=torch.float32, reference="none", **options):
    return settings.load(device=CPU, compute_dtype=dtype, reference=reference, **options)


def values_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """What a network holds of its base, by the base's names."""
    return {
        name.replace(".base_layer", ""): value.detach()
        for name, value in network.state_dict().items()
        if ".lora_" not in name
    }


def rounded(network: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The documented rounding: weights and biases of matrix products, and nothing else."""
    products = tuple(
        f"{name}."
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    )
    return {
        name: value.to(dtype) if name.startswith(products) else value
        for name, value in network.state_dict().items()
    }


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [
        name
        for name, value in expected.items()
        if found[name].dtype != value.dtype or not torch.equal(found[name], value)
    ]
    assert not different


def in_float32(path: Path, kind=UNet2DConditionModel, name="unet"):
    return kind.from_pretrained(path / name).float()


@pytest.mark.parametrize("adapter", [LORA, DORA], ids=["lora", "dora"])
def test_a_base_below_an_adapter_is_the_rounded_one(half_sdxl, adapter):
    model = load(SDXL(path=str(half_sdxl), lora=adapter), BF16, "adapter_off")

    base = in_float32(half_sdxl)
    assert_same_bits(values_of(model.network), rounded(base, BF16))
    base.load_state_dict(rounded(base, BF16))  # an adapter is made for what is run
    lora.attach(base.requires_grad_(False), adapter)
    ours = {n: v for n, v in model.network.state_dict().items() if ".lora_" in n}
    assert_same_bits(ours, {n: v for n, v in base.state_dict().items() if ".lora_" in n})
    assert {n for n, p in model.network.named_parameters() if p.requires_grad} == {
        n for n, p in base.named_parameters() if p.requires_grad
    }


def test_what_trains_is_in_float32_and_its_frozen_copy_is_the_rounded_one(half_sdxl):
    model = load(SDXL(path=str(half_sdxl)), BF16, "frozen_copy")

    base = in_float32(half_sdxl)
    assert_same_bits(values_of(model.network), base.state_dict())
    assert all(parameter.requires_grad for parameter in model.network.parameters())
    assert isinstance(model._reference, FrozenCopy)
    copied = model._reference.network
    assert_same_bits(copied.state_dict(), rounded(base, BF16))
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    kept = {parameter.data_ptr() for parameter in model.network.parameters()}
    assert not kept & {parameter.data_ptr() for parameter in copied.parameters()}


def test_a_model_that_is_only_evaluated_is_kept_rounded(half_sdxl):
    model = load(SDXL(path=str(half_sdxl)), torch.float16, trainable=False)

    assert_same_bits(values_of(model.network), rounded(in_float32(half_sdxl), torch.float16))
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


@pytest.mark.parametrize("vae_dtype", ["float32", "fp16", "bf16"])
def test_encoders_are_kept_in_their_own_precisions(half_sdxl, vae_dtype):
    model = load(SDXL(path=str(half_sdxl), lora=LORA, vae_dtype=vae_dtype), BF16)

    dtype = {"float32": torch.float32, "fp16": torch.float16, "bf16": BF16}[vae_dtype]
    vae = in_float32(half_sdxl, AutoencoderKL, "vae").to(dtype)
    assert_same_bits(model.autoencoder.network.state_dict(), vae.state_dict())
    for encoder, kind, name in zip(
        model.prompts.conditioner.text_encoders,
        (CLIPTextModel, CLIPTextModelWithProjection),
        ("text_encoder", "text_encoder_2"),
        strict=True,
    ):
        expected = in_float32(half_sdxl, kind, name).to(BF16)
        assert_same_bits(encoder.state_dict(), expected.state_dict())
        assert not encoder.training
        assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_a_model_to_sample_from_is_in_one_precision(half_sdxl, dtype):
    model = SDXL(path=str(half_sdxl)).load_to_sample(device=CPU, dtype=dtype)

    assert_same_bits(values_of(model.network), in_float32(half_sdxl).to(dtype).state_dict())
    kept = torch.float32 if dtype == torch.float16 else dtype  # its config says force_upcast
    assert {p.dtype for p in model.autoencoder.network.parameters()} == {kept}


def test_a_transformer_with_a_table_of_positions_is_read_whole(tmp_path):
    folder = write_sd3(tmp_path / "sd3")
    model = load(SD3(path=str(folder), lora=LORA), BF16)

    base = in_float32(folder, SD3Transformer2DModel, "transformer")
    assert any("pos_embed" in name for name, _ in base.named_buffers())
    assert_same_bits(values_of(model.network), rounded(base, BF16))


def test_a_single_file_is_read_as_the_folder_it_was_made_of(tiny_sd15, tmp_path):
    file = write_single_file(tiny_sd15, tmp_path / "whole.safetensors")
    settings = SD15(path=str(file), config=str(tiny_sd15), lora=LORA)

    found, expected = load(settings, BF16), load(SD15(path=str(tiny_sd15), lora=LORA), BF16)

    assert_same_bits(found.network.state_dict(), expected.network.state_dict())
    for part in ("autoencoder.network", "prompts.conditioner.text_encoder"):
        ours, theirs = (_part(model, part).state_dict() for model in (found, expected))
        assert_same_bits(ours, theirs)


def _part(model, dotted):
    for name in dotted.split("."):
        model = getattr(model, name)
    return model


def test_reading_in_pieces_changes_nothing(half_sdxl, monkeypatch):
    monkeypatch.setattr(weights, "_MAPPED", 1000)

    model = load(SDXL(path=str(half_sdxl)))

    assert_same_bits(values_of(model.network), in_float32(half_sdxl).state_dict())


def test_weights_lie_in_memory_of_their_own(tiny_sdxl):
    """In a mapped file they lie at any offset, and kernels round differently there."""
    model = load(SDXL(path=str(tiny_sdxl)))

    encoders = model.prompts.conditioner.text_encoders
    for network in (model.network, model.autoencoder.network, *encoders):
        for name, parameter in network.named_parameters():
            assert parameter.data_ptr() % 64 == 0, name


@pytest.fixture
def changed(tiny_sdxl, tmp_path):
    """Changes the tensors of one part of a copied folder."""
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")

    def change(component, edit):
        file = next((folder / component).glob("*.safetensors"))
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        return SDXL(path=str(folder))

    return change


@pytest.mark.parametrize(
    ("component", "kind"), [("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")]
)
def test_missing_and_left_over_tensors_are_refused_by_name(changed, component, kind):
    def rename(tensors):
        first, second = sorted(tensors)[:2]
        tensors["other.weight"] = tensors.pop(first)
        del tensors[second]

    settings = changed(component, rename)
    with pytest.raises(
        ModelError,
        match=rf"{component}/diffusion_pytorch_model.safetensors does not hold the weights of the "
        rf"{kind} .* lacks 2 tensors, such as \S+ and has no place for 1 tensors, such as "
        r"other\.weight\.",
    ):
        load(settings)


def test_a_tensor_of_another_shape_is_refused_by_name(changed):
    settings = changed("unet", lambda t: t.update({"conv_in.bias": torch.zeros(3)}))

    with pytest.raises(ModelError, match=r"conv_in\.bias is of shape \[3\] in .* of shape \[\d+\]"):
        load(settings)


def test_missing_weights_of_a_text_encoder_are_refused_by_name(changed):
    settings = changed("text_encoder", lambda t: t.pop(next(n for n in t if "fc1.bias" in n)))

    with pytest.raises(ModelError, match=r"lacks 1 weights of a CLIPTextModel, such as .*fc1.bias"):
        load(settings)


def test_an_index_that_names_a_file_which_is_gone_is_refused(half_sdxl, tmp_path):
    folder = shutil.copytree(half_sdxl, tmp_path / "model")
    index = next((folder / "unet").glob("*.index.json"))
    last = max(json.loads(index.read_text())["weight_map"].values())
    (folder / "unet" / last).unlink()

    with pytest.raises(ModelError, match=last):
        load(SDXL(path=str(folder)))


def test_an_autoencoder_with_the_names_of_2022_is_read(changed, tiny_sdxl):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for name in [n for n in tensors if "attentions" in n]:
            for new, before in old.items():
                if f".{new}." in name:
                    tensors[name.replace(new, before)] = tensors.pop(name)

    model = load(changed("vae", rename))

    expected = in_float32(tiny_sdxl, AutoencoderKL, "vae").state_dict()
    assert_same_bits(model.autoencoder.network.state_dict(), expected)


def test_encoders_of_host_memory_are_on_the_device_for_each_use_alone():
    """On a device that is no CPU: that of tensors without values."""
    network, device = nn.Linear(2, 3).requires_grad_(False), torch.device("meta")
    host = {name: value.data_ptr() for name, value in network.named_parameters()}

    with devices.on_device([network], device):
        assert {value.device for value in network.parameters()} == {device}
        assert network(torch.zeros(1, 2, device=device)).shape == (1, 3)

    assert {name: value.data_ptr() for name, value in network.named_parameters()} == host


def test_offloaded_encoders_encode_the_same(tiny_sdxl, make_pairs):
    images = make_pairs("a").images["chosen"]
    there, moved = (
        load(SDXL(path=str(tiny_sdxl), encoders=where)) for where in ("resident", "offload")
    )

    assert torch.equal(there.autoencoder.encode(images, [1]), moved.autoencoder.encode(images, [1]))
    ours, theirs = (model.prompts.encode(["a fox"]) for model in (there, moved))
    assert torch.equal(ours.hidden_states, theirs.hidden_states)
    assert torch.equal(ours.pooled, theirs.pooled)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_encoders_leave_nothing_on_the_gpu(tiny_sdxl, make_pairs):
    cuda = torch.device("cuda")
    settings = SDXL(path=str(tiny_sdxl), encoders="offload")
    model = settings.load(device=cuda, compute_dtype=torch.float32, reference="none")
    encoders = [model.autoencoder.network, *model.prompts.conditioner.networks]
    assert all(p.is_pinned() for network in encoders for p in network.parameters())
    images = make_pairs("a").images["chosen"]
    model.autoencoder.encode(images, [1])
    before = torch.cuda.memory_allocated()

    latents = model.autoencoder.encode(images, [1])
    embeddings = model.prompts.encode(["a fox"])

    assert latents.is_cuda
    assert embeddings.hidden_states.is_cuda
    kept = [latents, embeddings.hidden_states, embeddings.pooled]
    del embeddings
    assert torch.cuda.memory_allocated() - before <= sum(512 * -(-t.nbytes // 512) for t in kept)


def test_tiles_are_for_images_above_the_autoencoders_own_size(tiny_sdxl, make_pairs):
    images = make_pairs("a", size=128).images["chosen"]
    whole, tiled = (load(SDXL(path=str(tiny_sdxl), vae_tiling=tiling)) for tiling in (False, True))
    assert tiled.autoencoder.network.use_tiling
    assert not whole.autoencoder.network.use_tiling
    small = tiled.autoencoder.network.config.sample_size
    assert small < 128

    latents = [model.autoencoder.encode(images, [1]) for model in (whole, tiled)]

    assert latents[0].shape == latents[1].shape
    assert not torch.equal(*latents)


def test_an_adapter_is_exported_without_a_look_at_the_base(half_sdxl, tmp_path, monkeypatch):
    model = load(SDXL(path=str(half_sdxl), lora=LORA), BF16)

    def refuse(*args, **options):
        raise AssertionError("weights of the base are read")

    for name in ("load", "stored", "load_text_encoder"):
        monkeypatch.setattr(Folder, name, refuse)
    model.export(tmp_path / "final")

    assert (tmp_path / "final/pytorch_lora_weights.safetensors").is_file()


def test_an_export_of_all_weights_reads_those_that_did_not_train_alone(
    half_sdxl, tmp_path, monkeypatch
):
    model = load(SDXL(path=str(half_sdxl)), BF16)
    read = []

    def spy_on(name):
        method = getattr(Folder, name)

        def spy(location, component, *args):
            read.append(component)
            return method(location, component, *args)

        monkeypatch.setattr(Folder, name, spy)

    spy_on("stored")
    spy_on("load_text_encoder")
    model.export(tmp_path / "final")

    assert sorted(read) == ["text_encoder", "text_encoder_2", "vae"]
    found = in_float32(tmp_path / "final").state_dict()
    assert_same_bits(found, in_float32(half_sdxl).state_dict())
