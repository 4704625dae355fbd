from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffalign.errors import ModelError
from diffalign.models import lora
from diffalign.models.lora import LoraSettings


@pytest.fixture
def network(tiny_sd15):
    return UNet2DConditionModel.from_pretrained(tiny_sd15 / "unet").requires_grad_(False)


def trained(network):
    return {name: p.clone() for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (LoraSettings(rank=16), 1.0),  # alpha is the rank
        (LoraSettings(rank=16, alpha=8), 8 / 16),
        (LoraSettings(rank=16, alpha=8, rslora=True), 8 / 4),
    ],
)
def test_scale_worked_by_hand_is_what_peft_uses(network, settings, expected):
    lora.attach(network, settings)

    scales = {m.scaling["default"] for m in network.modules() if hasattr(m, "scaling")}

    assert settings.scale == expected
    assert scales == {expected}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0}, "alpha must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1.0"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LoraSettings(**change)


def test_a_target_that_matches_nothing_is_refused_naming_what_exists(network):
    message = r"'to_kk', which ends the name of no .*to_k, to_out.0.*Did you mean to_k\?"

    with pytest.raises(ModelError, match=message):
        lora.check_targets(network, LoraSettings(targets=("to_q", "to_kk")))


def test_part_of_a_layers_name_is_no_target(network):
    with pytest.raises(ModelError, match="'o_q'"):
        lora.check_targets(network, LoraSettings(targets=("o_q",)))


def test_the_seed_alone_decides_how_training_starts(network, tiny_sd15):
    again = UNet2DConditionModel.from_pretrained(tiny_sd15 / "unet").requires_grad_(False)
    other = UNet2DConditionModel.from_pretrained(tiny_sd15 / "unet").requires_grad_(False)
    torch.manual_seed(1)
    lora.attach(network, LoraSettings(rank=2))
    torch.manual_seed(2)
    lora.attach(again, LoraSettings(rank=2))
    lora.attach(other, LoraSettings(rank=2, seed=1))

    name = next(name for name in trained(network) if "lora_A" in name)

    assert all(torch.equal(value, trained(again)[key]) for key, value in trained(network).items())
    assert not torch.equal(trained(network)[name], trained(other)[name])


def test_attaching_leaves_the_global_generator_as_it_was(network):
    before = torch.random.get_rng_state()

    lora.attach(network, LoraSettings(rank=2))

    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_trains_is_the_same_after_the_adapter_was_off(network):
    lora.attach(network, LoraSettings(rank=2))
    frozen = next(p for p in network.parameters() if p.requires_grad)
    frozen.requires_grad_(False)  # by somebody else; peft alone would switch it on again
    flags = {name: p.requires_grad for name, p in network.named_parameters()}

    with pytest.raises(KeyError), lora.disabled(lora.adapter_layers(network)):
        raise KeyError

    assert {name: p.requires_grad for name, p in network.named_parameters()} == flags
    assert not any(m.disable_adapters for m in network.modules() if hasattr(m, "lora_A"))


def test_a_portable_adapter_has_a_scale_of_one(network):
    settings = LoraSettings(rank=4, alpha=2)
    lora.attach(network, settings)
    values = {name: torch.full_like(value, 3.0) for name, value in trained(network).items()}

    state = lora.portable_state(network, values, settings)

    assert {value.unique().item() for name, value in state.items() if "lora_A" in name} == {3.0}
    assert {value.unique().item() for name, value in state.items() if "lora_B" in name} == {1.5}
    assert not any("default" in name for name in state)
