"""Blocks that are checkpointed or compiled give what they give otherwise."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from diffalign import config
from diffalign.errors import ConfigError, ModelError
from diffalign.likelihoods.denoising import Denoising
from diffalign.models.diffusion import blocks
from diffalign.models.diffusion.sd3 import SD3
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings
from diffalign.training.config import RunConfig
from tests.tiny_models import write_sd3

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_sd3(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("models") / "sd3")


def load(settings):
    reference = "none" if settings.lora is None else "adapter_off"
    return settings.load(device=CPU, compute_dtype=torch.float32, reference=reference)


def loss_and_gradients(model, batch) -> list[torch.Tensor]:
    likelihood = Denoising()
    policy = likelihood.evaluate(model, likelihood.prepare(model, batch))
    loss = (policy["rejected"] - policy["chosen"]).mean()
    loss.backward()
    return [loss.detach(), *(p.grad for _, p in model.trained_parameters())]


@pytest.mark.parametrize(
    ("backbone", "chosen", "per_pair"),
    [
        (SDXL, ("down_blocks.1",), "down_blocks.1."),
        (SDXL, ("mid_block", "up_blocks"), ("mid_block.", "up_blocks.")),
        (SD3, ("transformer_blocks.0",), "transformer_blocks.0."),
    ],
)
def test_chosen_blocks_alone_are_recomputed_with_equal_results(
    backbone, chosen, per_pair, request, make_pairs, monkeypatch
):
    name = "tiny_sdxl" if backbone is SDXL else "tiny_sd3"
    plain = backbone(path=str(request.getfixturevalue(name)), lora=LoraSettings(rank=2))
    batch = make_pairs(1)
    expected = loss_and_gradients(load(plain), batch)
    recomputed = []
    original = blocks.checkpoint

    def counted(function, *arguments, **options):
        recomputed.append(function.__self__)
        return original(function, *arguments, **options)

    monkeypatch.setattr(blocks, "checkpoint", counted)
    model = load(replace(plain, gradient_checkpointing=chosen))
    found = loss_and_gradients(model, batch)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    names = {module: name for name, module in model.network.named_modules()}
    called = {f"{names[module]}." for module in recomputed}
    assert called and all(name.startswith(per_pair) for name in called)


def test_all_blocks_by_name_are_as_many_as_all():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8, attention_head_dim=2,
        )  # fmt: skip
    assert blocks.block_names(network) == [
        *("down_blocks", "down_blocks.0", "down_blocks.1"),
        *("up_blocks", "up_blocks.0", "up_blocks.1", "mid_block"),
    ]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            ("down_block.1",),
            r"names 'down_block.1', and UNet2DConditionModel has the blocks down_b",
        ),
        (("mid_blok",), r"Did you mean mid_block\?"),
        (("transformer_blocks",), "names 'transformer_blocks'"),
        ((), "is an empty list: write false"),
    ],
)
def test_blocks_that_are_not_there_are_refused_before_weights_are_read(tiny_sdxl, chosen, message):
    with pytest.raises(ModelError, match=message):
        SDXL(path=str(tiny_sdxl), gradient_checkpointing=chosen).check()


def test_both_settings_take_true_and_false_as_before_and_say_what_else():
    def loaded(setting):
        file = "configs/smoke/diffusion_dpo_sdxl.yaml"
        from pathlib import Path

        return config.load(RunConfig, Path(__file__).parents[3] / file, [setting]).model

    assert loaded("model.gradient_checkpointing=true").gradient_checkpointing is True
    assert loaded("model.gradient_checkpointing=[mid_block]").gradient_checkpointing == (
        "mid_block",
    )
    assert loaded("model.compile=blocks").compile == "blocks"
    assert loaded("model.compile=true").compile is True
    with pytest.raises(ConfigError, match=r"model.compile must be true or false or blocks"):
        loaded("model.compile=block")


@pytest.mark.slow
def test_compiled_blocks_are_compiled_in_the_first_step_and_never_again(
    tiny_sdxl, make_pairs, monkeypatch
):
    """By a backend that makes no code, so that graphs are counted and nothing is built."""
    plain = SDXL(path=str(tiny_sdxl), lora=LoraSettings(rank=2))
    batch = make_pairs(1)
    likelihood = Denoising()

    def values(model):
        prepared = likelihood.prepare(model, batch)
        with torch.no_grad(), model.reference():
            reference = likelihood.evaluate(model, prepared)
        policy = likelihood.evaluate(model, prepared)
        policy["chosen"].mean().backward()
        return policy["chosen"].detach(), reference["chosen"]

    expected = values(load(plain))
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager")
    )
    model = load(replace(plain, compile="blocks"))
    compiled = [m for m in model.network.modules() if m._compiled_call_impl is not None]
    assert {type(m).__name__ for m in compiled} == {"BasicTransformerBlock"}
    found = values(model)
    first = counters["stats"]["unique_graphs"]
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    assert torch.allclose(found[1], expected[1], atol=1e-6)
    for _ in range(3):
        values(model)
    assert 0 < counters["stats"]["unique_graphs"] == first


@pytest.mark.slow
def test_compiled_blocks_learn_as_plain_ones(tiny_sdxl, make_pairs):
    torch._dynamo.reset()
    plain = SDXL(path=str(tiny_sdxl), lora=LoraSettings(rank=2))
    batch = make_pairs(1)
    expected = loss_and_gradients(load(plain), batch)
    found = loss_and_gradients(load(replace(plain, compile="blocks")), batch)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_channels_last_computes_the_same_to_rounding(tiny_sdxl, make_pairs):
    plain = SDXL(path=str(tiny_sdxl))
    batch = make_pairs(1)
    expected = loss_and_gradients(load(plain), batch)
    model = load(replace(plain, channels_last=True))
    weight = model.network.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(loss_and_gradients(model, batch), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
