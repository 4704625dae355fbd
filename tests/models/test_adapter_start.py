"""An adapter that goes on from another run's: the same policy, under whatever scale it trains."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from diffalign.errors import ModelError
from diffalign.models import lora
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings

CPU = torch.device("cpu")


def load(settings, reference="none"):
    return settings.load(device=CPU, compute_dtype=torch.float32, reference=reference)


def predict(model):
    noisy = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(3))
    with model.sampling():
        return model.denoiser(["a red thing"], guidance=1)(noisy, torch.tensor([400]))


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def earlier(request, tiny_sdxl, tmp_path):
    """What a run wrote, its settings and its model."""
    settings = LoraSettings(rank=2, alpha=3, dora=request.param)
    model = load(SDXL(path=str(tiny_sdxl), lora=settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.export(tmp_path / "run/final")
    return tmp_path / "run", settings, model


@pytest.mark.parametrize("alpha", [3, None, 8])
def test_training_begins_with_the_policy_that_was_exported(earlier, tiny_sdxl, alpha):
    run, settings, model = earlier
    going_on = dataclasses.replace(settings, alpha=alpha, seed=9, start=run)
    continued = load(SDXL(path=str(tiny_sdxl), lora=going_on), reference="past_policy")
    assert torch.allclose(predict(continued), predict(model), atol=1e-5)
    assert not torch.allclose(predict(load(SDXL(path=str(tiny_sdxl)))), predict(model), atol=1e-2)
    with torch.no_grad():
        for _, parameter in continued.trained_parameters():
            parameter.zero_()
    with continued.reference():
        assert torch.allclose(predict(continued), predict(model), atol=1e-5)


def test_the_settings_of_a_file_open_the_same_policy(earlier, tiny_sdxl):
    run, settings, model = earlier
    found = lora.settings_of(run / "final/pytorch_lora_weights.safetensors")
    assert (found.rank, found.dora) == (settings.rank, settings.dora)
    assert torch.allclose(
        predict(load(SDXL(path=str(tiny_sdxl), lora=found))), predict(model), atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 4}, r"lora\.start: the adapter in .* has rank 2, and lora\.rank is 4: set"),
        ({"targets": ("to_q",)}, r"lora\.start: .* different layers: only the file has .*to_k"),
        ({"targets": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2")}, "only this run has .*ff"),
    ],
)
def test_an_adapter_of_another_shape_is_refused_before_weights(earlier, tiny_sdxl, change, message):
    run, settings, _ = earlier
    other = dataclasses.replace(settings, start=run, **change)
    with pytest.raises(ModelError, match=message):
        SDXL(path=str(tiny_sdxl), lora=other).check()


def test_an_adapter_of_another_backbone_is_refused(earlier, tiny_sd15):
    run, settings, _ = earlier
    with pytest.raises(ModelError, match=r"lora\.start: .*(different layers|is of shape)"):
        SD15(path=str(tiny_sd15), lora=dataclasses.replace(settings, start=run)).check()


def test_a_missing_adapter_is_refused_before_weights(tiny_sdxl, tmp_path):
    gone = LoraSettings(rank=2, start=tmp_path / "gone.safetensors")
    with pytest.raises(ModelError, match=r"gone\.safetensors: there is no such adapter"):
        SDXL(path=str(tiny_sdxl), lora=gone).check()


def test_fingerprints_follow_the_content_of_the_start_and_not_its_place(
    earlier, tiny_sdxl, tmp_path
):
    run, settings, _ = earlier
    base = SDXL(path=str(tiny_sdxl))

    def starting_at(path):
        return dataclasses.replace(base, lora=dataclasses.replace(settings, start=path))

    first = starting_at(run)
    moved = starting_at(shutil.copytree(run, tmp_path / "moved"))
    assert first.policy_fingerprint() == moved.policy_fingerprint()
    assert first._fingerprint() == moved._fingerprint()
    fresh = dataclasses.replace(base, lora=settings)
    assert fresh.policy_fingerprint() == base.policy_fingerprint() != first.policy_fingerprint()
    assert fresh._fingerprint() != first._fingerprint()
