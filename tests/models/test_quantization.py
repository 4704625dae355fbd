"""An adapter over a base of few bits: what is quantised, that it trains, and what is refused."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffalign.errors import ModelError
from diffalign.likelihoods.denoising import Denoising
from diffalign.models import quantization
from diffalign.models.devices import evaluation_mode
from diffalign.models.diffusion.sd3 import SD3
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings
from diffalign.models.quantization import quantised_layers
from diffalign.objectives.dpo import DPO
from tests.tiny_models import write_sd3

CPU = torch.device("cpu")
LORA = LoraSettings(rank=2)
BITS = ("4bit", "8bit")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def tiny_sd3(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("models") / "sd3")


def settings_of(backbone: str, request, **fields):
    folder = request.getfixturevalue(f"tiny_{backbone}")
    return {"sdxl": SDXL, "sd3": SD3}[backbone](path=str(folder), lora=LORA, **fields)


def load(settings, dtype=torch.float32):
    return settings.load(device=CPU, compute_dtype=dtype, reference="adapter_off")


def losses(model, batch, steps: int = 3) -> list[float]:
    """Of DPO, from the start on."""
    likelihood, objective = Denoising(), DPO(beta=50.0)
    optimizer = torch.optim.AdamW([p for _, p in model.trained_parameters()], lr=1e-2)
    found = []
    for _ in range(steps):
        prepared = likelihood.prepare(model, batch)
        with torch.no_grad(), model.reference():
            reference = likelihood.evaluate(model, prepared)
        policy = likelihood.evaluate(model, prepared)
        from diffalign.training.look_ahead import views_of

        loss = objective(
            views_of(policy, reference, likelihood.row_metadata(prepared), {})
        ).loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def prediction(model, *, reference: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noisy = torch.randn(2, model.latent_space.channels, 4, 4, generator=generator)
    with torch.no_grad(), model.reference() if reference else nullcontext():
        denoise = model.denoiser(["a fox", "a cat"], guidance=1.0, size=(32, 32))
        return denoise(noisy, torch.tensor([300.0, 700.0]))


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backbone", ["sdxl", "sd3"])
def test_a_quantised_base_trains_an_adapter_to_nearly_the_same_loss(
    backbone, bits, request, make_pairs
):
    batch = make_pairs(2)
    plain = losses(load(settings_of(backbone, request)), batch)
    model = load(settings_of(backbone, request, quantization=bits))
    found = losses(model, batch)
    assert found[0] == pytest.approx(plain[0], abs=1e-5), "at the start it is the reference"
    assert found[-1] < found[0] - 1e-4
    assert found == pytest.approx(plain, rel=0.1)
    moved = {name for name, p in model.network.named_parameters() if p.requires_grad}
    assert moved and all(".lora_" in name for name in moved)
    assert all(p.grad is None for n, p in model.network.named_parameters() if n not in moved)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_weights_of_transformer_blocks_alone_are_kept_in_few_bits(tiny_sdxl, bits):
    plain = SDXL(path=str(tiny_sdxl), lora=LORA)
    model = load(replace(plain, quantization=bits), torch.bfloat16)
    blank = plain.parts.blank_network()
    expected = set(quantised_layers(blank))
    found = {
        name.replace(".base_layer", ""): module.weight
        for name, module in model.network.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point()
    }
    assert found.keys() == expected and all(".transformer_blocks." in name for name in found)
    assert "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2" in found
    assert model.network.conv_in.weight.dtype == torch.bfloat16
    for name, weight in found.items():
        assert weight.nbytes == blank.get_submodule(name).weight.numel() // (8 // int(bits[0]))


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backbone", ["sdxl", "sd3"])
def test_the_reference_is_the_quantised_base_and_near_the_plain_one(backbone, bits, request):
    plain = prediction(load(settings_of(backbone, request)), reference=True)
    model = load(settings_of(backbone, request, quantization=bits))
    found = prediction(model, reference=True)
    error = float((found - plain).norm() / plain.norm())
    assert 0 < error < (0.1 if bits == "4bit" else 0.02)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.1)
    assert torch.equal(prediction(model, reference=True), found)
    assert not torch.equal(prediction(model), found)


@needs_bitsandbytes
def test_an_evaluation_in_bf16_leaves_the_gradient_to_training(tiny_sdxl, make_pairs):
    model = load(SDXL(path=str(tiny_sdxl), lora=LORA, quantization="4bit"), torch.bfloat16)
    with evaluation_mode(model.network):
        prediction(model)
    likelihood = Denoising()
    policy = likelihood.evaluate(model, likelihood.prepare(model, make_pairs(1)))
    policy["chosen"].mean().backward()
    gradients = {name: p.grad for name, p in model.trained_parameters()}
    assert all(g is not None for g in gradients.values())
    assert any(g.abs().max() > 0 for n, g in gradients.items() if "down_blocks" in n)


@needs_bitsandbytes
def test_the_weights_are_those_that_bitsandbytes_makes_of_the_file(tiny_sdxl):
    from bitsandbytes import functional

    model = load(SDXL(path=str(tiny_sdxl), lora=LORA, quantization="4bit"))
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    stored = load_file(tiny_sdxl / "unet/diffusion_pytorch_model.safetensors")[f"{name}.weight"]
    packed, state = functional.quantize_4bit(
        stored, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    kept = model.network.get_submodule(name).weight
    assert torch.equal(kept.data.flatten(), packed.flatten())
    ours = functional.dequantize_4bit(kept.data, kept.quant_state)
    assert torch.equal(ours, functional.dequantize_4bit(packed, state))


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_its_adapter_starts_as_any_other_and_is_exported_as_any_other(tiny_sdxl, tmp_path, bits):
    plain = load(SDXL(path=str(tiny_sdxl), lora=LORA))
    model = load(SDXL(path=str(tiny_sdxl), lora=LORA, quantization=bits))
    ours, theirs = dict(model.trained_parameters()), dict(plain.trained_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == torch.float32 for n in ours)
    model.export(tmp_path / "quantised")
    plain.export(tmp_path / "plain")
    names = [f.name for f in sorted((tmp_path / "plain").iterdir())]
    assert [f.name for f in sorted((tmp_path / "quantised").iterdir())] == names
    file = "pytorch_lora_weights.safetensors"
    first, second = (load_file(tmp_path / n / file) for n in ("quantised", "plain"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_it_was_quantised_to_is_part_of_what_it_is(tiny_sdxl):
    plain = SDXL(path=str(tiny_sdxl), lora=LORA)
    found = [replace(plain, quantization=bits) for bits in (None, *BITS)]
    assert len({settings.policy_fingerprint() for settings in found}) == 3
    assert len({settings._fingerprint() for settings in found}) == 3
    assert "in 4bit" in found[1].describe()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": None}, "weights of so few bits cannot train: give lora a rank"),
        ({"lora": LoraSettings(dora=True)}, "set lora.dora to false"),
        ({"compile": True}, "no part of a compiled graph"),
        ({"compile": "blocks"}, "no part of a compiled graph"),
    ],
)
def test_what_cannot_go_with_few_bits_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SDXL(path="somewhere", quantization="4bit", **{"lora": LORA, **fields})


def test_a_missing_library_is_told_before_weights_are_read(tiny_sdxl, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install 'diffalign\[bitsandbytes\]'"):
        SDXL(path=str(tiny_sdxl), lora=LORA, quantization="4bit").check()


def test_a_library_that_needs_a_gpu_is_told_where_there_is_none(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.45.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"bitsandbytes 0\.45\.1 needs one"):
        quantization.check_quantization("8bit")


def test_a_network_without_transformer_blocks_is_refused():
    with pytest.raises(ModelError, match="no linear layer in transformer blocks"):
        quantization.quantise_blank(nn.Sequential(nn.Linear(2, 2)), "4bit", torch.float32)
