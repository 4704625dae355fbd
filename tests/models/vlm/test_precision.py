"""The residual stream in half precision: what is kept of it, and that losses stay right."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import softplus
from transformers import AutoModelForImageTextToText

from diffalign.likelihoods.tokens import Tokens
from diffalign.models.lora import LoraSettings
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.precision import Precisions
from tests.responses import response_batch
from tests.tiny_vlm import WIDTH, tiny_llava, tiny_llava_next, tiny_qwen2_5_vl, tiny_qwen2_vl

FAMILIES = {
    "llava": tiny_llava,
    "llava_next": tiny_llava_next,
    "qwen2_vl": tiny_qwen2_vl,
    "qwen2_5_vl": tiny_qwen2_5_vl,
}
LORA = LoraSettings(rank=2)
PER_TOKEN = 0.05
"""Nats a token, in the mean over responses. With a stream in float32 autocast alone errs by as much
on these models."""


@cache
def base(family: str, dtype: torch.dtype) -> Path:
    """A model of bf16 numbers, saved in `dtype`."""
    folder = FAMILIES[family](Path(mkdtemp()))
    model = AutoModelForImageTextToText.from_pretrained(folder).to(torch.bfloat16)
    model.to(dtype).save_pretrained(folder)
    return folder


def load(
    family: str = "llava",
    *,
    saved: torch.dtype = torch.bfloat16,
    compute: torch.dtype = torch.bfloat16,
    lora: LoraSettings | None = LORA,
    **settings: Any,
) -> Any:
    model = VLM(path=str(base(family, saved)), lora=lora, **settings).load(
        device=torch.device("cpu"),
        compute_dtype=compute,
        reference="frozen_copy" if lora is None else "adapter_off",
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the policy is not where it started
        for _, parameter in model.trained_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def step(model: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(log-probability per token, loss, gradient, what the forward saved) of DPO."""
    likelihood = Tokens()
    prepared = likelihood.prepare(model, response_batch(model.processor, image_counts=(1, 2)))
    with torch.no_grad(), model.reference():
        reference = likelihood.evaluate(model, prepared)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        policy = likelihood.evaluate(model, prepared)
    lengths = {view: row["length"] for view, row in likelihood.row_metadata(prepared).items()}
    ratio = {view: policy[view] - reference[view] for view in policy}
    loss = softplus(ratio["rejected"] - ratio["chosen"]).mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for _, p in model.trained_parameters()])
    per_token = torch.cat([(policy[view] / lengths[view]).detach() for view in sorted(policy)])
    return per_token, loss.detach(), gradient, saved


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_float32_up_to_rounding(family, lora):
    exact, true_loss, wanted, _ = step(load(family, compute=torch.float32, lora=lora))
    found, loss, gradient, _ = step(load(family, lora=lora))
    assert found.dtype == gradient.dtype == torch.float32
    assert (found - exact).abs().mean() < PER_TOKEN
    assert (loss - true_loss).abs() < 0.2
    assert torch.cosine_similarity(gradient, wanted, dim=0) > 0.99
    assert (gradient - wanted).norm() < 0.15 * wanted.norm()


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_keeps_half_the_bytes_of_the_stream(family, lora):
    def of_stream(saved_in: torch.dtype) -> dict[torch.dtype, int]:
        model = load(family, saved=saved_in, lora=lora, gradient_checkpointing=True)
        *_, saved = step(model)
        layers = model.network.model.config.get_text_config().num_hidden_layers
        # transformers 4 keeps which numbers are of images as well
        numbers = [t for t in saved if t.is_floating_point()]
        inputs = [t for t in numbers if t.dim() == 3 and t.shape[-1] == WIDTH][:layers]
        assert len(inputs) == layers and len({t.shape for t in inputs}) == 1
        return {t.dtype: sum(other.nbytes for other in inputs) for t in inputs}

    whole, half = of_stream(torch.float32), of_stream(torch.bfloat16)
    assert list(whole) == [torch.float32] and list(half) == [torch.bfloat16]
    assert 2 * half[torch.bfloat16] == whole[torch.float32]


@pytest.mark.parametrize(
    ("saved", "compute", "kept"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float16),  # as LLaVA-1.5 is on the hub
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float32),  # a stream exceeds its range
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_what_is_frozen_stays_as_saved_and_what_trains_is_float32(saved, compute, kept):
    model = load(saved=saved, compute=compute)
    language = model.network.language
    norm = language.layers[0].input_layernorm
    assert language.embed_tokens.weight.dtype == norm.weight.dtype == kept
    assert {p.dtype for _, p in model.trained_parameters()} == {torch.float32}
    seen: list[torch.dtype] = []
    language.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    step(model)
    assert set(seen) == {torch.float32 if kept == torch.float32 else compute}
    assert next(model.network.tower.parameters()).dtype == torch.float32  # its embeddings


def test_a_frozen_copy_says_the_same_bit_for_bit_and_keeps_what_its_file_has():
    model = VLM(path=str(base("qwen2_5_vl", torch.bfloat16)), lora=None).load(
        device=torch.device("cpu"), compute_dtype=torch.bfloat16, reference="frozen_copy"
    )
    likelihood = Tokens()
    prepared = likelihood.prepare(model, response_batch(model.processor))
    with torch.no_grad(), model.reference():
        reference = likelihood.evaluate(model, prepared)
    policy = likelihood.evaluate(model, prepared)
    assert all(torch.equal(policy[view], reference[view]) for view in reference)
    with model.reference(), model.inference() as copied:
        assert copied.language.embed_tokens.weight.dtype == torch.bfloat16
    assert model.network.language.embed_tokens.weight.dtype == torch.float32


def test_a_network_without_embeddings_or_norms_has_nothing_to_round():
    found = Precisions.of(torch.nn.Linear(2, 2).half(), torch.bfloat16)
    assert found.between == torch.float32 and not found.halves_stream
