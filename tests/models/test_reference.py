"""A past policy as reference: the trained parameters' values are exchanged, and nothing else."""

from __future__ import annotations

import pytest
import torch

from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings

CPU = torch.device("cpu")
TRAININGS = [
    pytest.param(LoraSettings(rank=2), id="lora"),
    pytest.param(LoraSettings(rank=2, dora=True), id="dora"),
    pytest.param(None, id="full"),
]


@pytest.fixture(params=TRAININGS)
def model(request, tiny_sd15):
    settings = SD15(path=str(tiny_sd15), lora=request.param)
    return settings.load(device=CPU, compute_dtype=torch.float32, reference="past_policy")


def output(model):
    """What the model says of one latent."""
    noisy = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.denoiser(["a cat"], guidance=1.0)(noisy, torch.tensor([500]))


def reference_output(model):
    with model.reference():
        return output(model)


def change(model, seed):
    """Move every trained parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_before_it_is_told_otherwise_it_is_the_policy_that_was_loaded(model):
    start = output(model)

    change(model, 1)

    assert torch.equal(reference_output(model), start)
    assert not torch.equal(output(model), start)


def test_it_is_the_policy_whose_values_it_was_given(model):
    change(model, 1)
    past, past_output = model.snapshot(), output(model)
    change(model, 2)
    present = output(model)

    model.refer_to(past)

    assert torch.equal(reference_output(model), past_output)
    assert torch.equal(output(model), present)
    assert not torch.equal(present, past_output)


def test_given_values_are_copied(model):
    change(model, 1)
    past = model.snapshot()
    model.refer_to(past)
    expected = reference_output(model)

    for value in past.values():
        value.zero_()

    assert torch.equal(reference_output(model), expected)


def test_a_snapshot_does_not_follow_the_policy(model):
    before = model.snapshot()
    kept = {name: value.clone() for name, value in before.items()}

    change(model, 1)

    assert [name for name, _ in model.trained_parameters()] == list(before)
    assert all(torch.equal(before[name], kept[name]) for name in kept)
    assert not any(value.requires_grad for value in before.values())


def test_the_policy_is_back_after_an_error_inside(model):
    change(model, 1)
    before, values = output(model), model.snapshot()

    with pytest.raises(KeyError), model.reference():
        raise KeyError

    assert torch.equal(output(model), before)
    assert all(torch.equal(p, values[name]) for name, p in model.trained_parameters())


def test_an_optimiser_goes_on_training_the_same_parameters(model):
    parameters = dict(model.trained_parameters())
    addresses = {name: p.data_ptr() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)

    with model.reference():
        inside = {name: p.data_ptr() for name, p in model.trained_parameters()}
    denoise = model.denoiser(["a cat"], guidance=1.0)
    denoise(torch.ones(1, 4, 4, 4), torch.tensor([500])).square().mean().backward()
    before = output(model)
    optimizer.step()

    assert not set(inside.values()) & set(addresses.values())
    assert all(p is parameters[name] for name, p in model.trained_parameters())
    assert all(p.data_ptr() == addresses[name] for name, p in model.trained_parameters())
    assert all(p.requires_grad for p in parameters.values())
    assert not torch.equal(output(model), before)


def test_values_that_do_not_fit_are_refused(model):
    values = model.snapshot()
    name = next(iter(values))

    with pytest.raises(ValueError, match=r"every trained parameter and no other; differing: other"):
        model.refer_to({**values, "other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"of shape \(1, 1, 1\), and the trained parameter is of"):
        model.refer_to({**values, name: torch.zeros(1, 1, 1)})


@pytest.mark.parametrize("reference", ["frozen_copy", "none"])
def test_a_fixed_reference_cannot_be_chosen(tiny_sdxl, reference):
    settings = SDXL(path=str(tiny_sdxl))
    model = settings.load(device=CPU, compute_dtype=torch.float32, reference=reference)

    with pytest.raises(ValueError, match="reference is fixed: load it with reference past_policy"):
        model.refer_to(model.snapshot())
