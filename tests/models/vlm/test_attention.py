"""How tokens attend: what is refused, and the numbers of what is not."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from diffalign.errors import ModelError
from diffalign.likelihoods.tokens import Tokens
from diffalign.models.lora import LoraSettings
from diffalign.models.vlm import loading
from diffalign.models.vlm.config import VLM
from tests.responses import response_batch
from tests.tiny_vlm import tiny_llava, tiny_qwen2_5_vl

FAMILIES = {"llava": tiny_llava, "qwen2_5_vl": tiny_qwen2_5_vl}


@cache
def folder(family: str) -> Path:
    return FAMILIES[family](Path(mkdtemp()))


def vlm(family: str = "llava", **settings: Any) -> VLM:
    return VLM(path=str(folder(family)), lora=LoraSettings(rank=2), **settings)


def load(settings: VLM, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    return settings.load(device=torch.device(device), compute_dtype=dtype, reference="adapter_off")


def values(model: Any) -> dict[str, torch.Tensor]:
    likelihood = Tokens()
    batch = response_batch(model.processor, image_counts=(1, 3, 0))
    with torch.no_grad():
        return likelihood.evaluate(model, likelihood.prepare(model, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_gives_the_numbers_of_the_fused_one_in_rows_of_their_own(family):
    fused, eager = load(vlm(family)), load(vlm(family, attention="eager"))
    assert fused.shares_prefix and not eager.shares_prefix
    assert eager.network.model.config.get_text_config()._attn_implementation == "eager"
    wanted, found = values(fused), values(eager)
    assert all(torch.allclose(found[view], wanted[view], atol=1e-4) for view in wanted)
    assert eager.remarks() == []  # it was said before anything was loaded


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2", "flash_attention_3"])
def test_what_takes_no_mask_of_branches_is_said_at_the_start_and_never_shares(attention):
    said = Tokens().note(vlm(attention=attention))
    assert said.startswith("repeated: ") and f"model.attention is {attention}" in said
    with pytest.raises(ModelError, match=f"prefix is shared, but model.attention is {attention}"):
        vlm(attention=attention, prefix="shared").check()
    repeated = vlm(attention=attention, prefix="repeated").prefix_obstacle
    assert repeated == "model.prefix is repeated"
    packed = Tokens().packing_obstacle(vlm(attention=attention))
    assert packed is not None and f"model.attention is {attention}" in packed


@pytest.fixture
def flash_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("attention", "package"),
    [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")],
)
def test_flash_attention_without_its_package_is_refused_before_weights_are_read(
    attention, package, monkeypatch
):
    monkeypatch.setattr(VLM, "_read", lambda *args, **options: pytest.fail("weights were read"))
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    wanted = f"attention is {attention}, which needs the package {package}, .*attention to sdpa"
    for attempt in (vlm(attention=attention).check, lambda: load(vlm(attention=attention))):
        with pytest.raises(ModelError, match=wanted):
            attempt()


@pytest.mark.usefixtures("flash_is_here")
def test_flash_attention_without_its_device_or_precision_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="needs a CUDA device, and this machine has none"):
        vlm(attention="flash_attention_2").check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    vlm(attention="flash_attention_2").check()
    with pytest.raises(ModelError, match=r"has no float32: set training\.precision"):
        load(vlm(attention="flash_attention_2"))


@pytest.mark.usefixtures("flash_is_here")
def test_a_family_without_flash_attention_is_refused(monkeypatch):
    from transformers import LlavaForConditionalGeneration

    monkeypatch.setattr(LlavaForConditionalGeneration, "_supports_flash_attn", False)
    with pytest.raises(ModelError, match="LlavaForConditionalGeneration does not have"):
        vlm(attention="flash_attention_2").check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_on_cuda_flash_attention_gives_the_numbers_of_the_fused_one(family):
    pytest.importorskip("flash_attn")
    wanted = values(load(vlm(family, prefix="repeated"), torch.bfloat16, "cuda"))
    found = values(load(vlm(family, attention="flash_attention_2"), torch.bfloat16, "cuda"))
    assert all(torch.allclose(found[view], wanted[view], rtol=0.02, atol=0.5) for view in wanted)
