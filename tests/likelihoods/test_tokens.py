"""Log-probabilities of responses under tiny models of every family."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from diffalign.likelihoods.tokens import Tokens, VisualGain
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.lora import LoraSettings
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.model import VisionLanguageModel
from tests.responses import response_batch
from tests.tiny_vlm import tiny_llava, tiny_llava_next, tiny_qwen2_5_vl, tiny_qwen2_vl

FAMILIES = {
    "llava": tiny_llava,
    "llava_next": tiny_llava_next,
    "qwen2_vl": tiny_qwen2_vl,
    "qwen2_5_vl": tiny_qwen2_5_vl,
}
LORA = LoraSettings(rank=2)
MIXED = (1, 0, 3)
"""Images of three samples."""


@cache
def folder(family: str) -> Path:
    return FAMILIES[family](Path(mkdtemp()))


def load(family: str = "llava", *, reference: Any = "adapter_off", **settings: Any) -> Any:
    settings = {"lora": LORA, "positions_at_once": 3, **settings}
    return VLM(path=str(folder(family)), **settings).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference=reference
    )


def stir(model: VisionLanguageModel, *, by: float = 0.05) -> None:
    """Move the policy away from where it started."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def measure(model: VisionLanguageModel, batch: Any, likelihood: Tokens | None = None) -> Any:
    """(reference, policy, row_metadata) of a batch."""
    likelihood = likelihood or Tokens()
    prepared = likelihood.prepare(model, batch)
    with torch.no_grad(), model.reference():
        reference = likelihood.evaluate(model, prepared)
    policy = likelihood.evaluate(model, prepared)
    return reference, policy, likelihood.row_metadata(prepared)


def close(left: Tensor, right: Tensor, *, within: float = 1e-5) -> bool:
    return torch.allclose(left, right, rtol=within, atol=within)


def plain_logits(family: str, batch: Any, response: str, condition: str | None = None) -> Tensor:
    """Logits before each token of a response, as transformers gives them, [B, L - 1, words]."""
    model = AutoModelForImageTextToText.from_pretrained(folder(family)).eval()
    rows = batch.responses[response]
    with torch.no_grad():
        output = model(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            **rows.further,
            **batch.image_inputs[condition],
        )
    return output.logits[:, :-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_is_that_of_the_logits_of_transformers(family):
    model = load(family)
    batch = response_batch(model.processor, image_counts=MIXED)
    _, policy, row_metadata = measure(model, batch)
    for view, rows in batch.responses.items():
        log_probs = plain_logits(family, batch, view).log_softmax(-1)
        own = log_probs.gather(-1, rows.input_ids[:, 1:, None])[..., 0]
        expected = (own * rows.response_mask[:, 1:]).sum(1)
        assert close(policy[view], expected)
        assert row_metadata[view]["length"].tolist() == rows.response_mask.sum(1).tolist()


@pytest.mark.parametrize(
    ("family", "image_inputs"), [*((family, MIXED) for family in FAMILIES), ("qwen2_vl", (0, 0))]
)
def test_one_vision_pass_is_the_plain_path(family, image_inputs):
    results = []
    for shared in (True, False):
        model = load(family, one_vision_pass=shared)
        stir(model)
        views = ("chosen", "rejected", "chosen@diffuse")
        batch = response_batch(model.processor, *views, image_counts=image_inputs)
        reference, policy, _ = measure(model, batch)
        sum(policy[view].sum() for view in views).backward()
        gradient = torch.cat([p.grad.flatten() for _, p in model.trained_parameters()])
        results.append((torch.stack([reference[view] for view in views]), policy, gradient))
    (reference, policy, gradient), (plain_reference, plain_policy, plain_gradient) = results
    assert close(reference, plain_reference)
    assert all(close(policy[view], plain_policy[view]) for view in policy)
    assert close(gradient, plain_gradient, within=1e-4)


def test_the_tower_runs_once_for_all_views_policy_and_reference():
    calls = []
    model = load()
    tower = model.network.tower
    encoder = getattr(tower, "vision_model", tower).encoder  # of transformers before 5
    encoder.register_forward_hook(lambda *_: calls.append(1))
    measure(model, response_batch(model.processor, "chosen", "rejected"))
    assert len(calls) == 1
    measure(model, response_batch(model.processor, "chosen", "rejected", "chosen@diffuse"))
    assert len(calls) == 3  # the condition has images of its own


@pytest.mark.parametrize("family", FAMILIES)
def test_images_matter_and_conditions_are_seen(family):
    model = load(family)
    batch = response_batch(model.processor, "chosen", "chosen@diffuse")
    _, policy, _ = measure(model, batch)
    changed = (policy["chosen"] - policy["chosen@diffuse"]).abs() > 1e-4
    assert changed.tolist() == [True, False, True]  # the second sample is text alone


@pytest.mark.parametrize(
    ("family", "reference"),
    [("llava", "adapter_off"), ("llava_next", "past_policy"), ("qwen2_vl", "frozen_copy")],
)
def test_the_reference_is_the_policy_until_the_first_step(family, reference):
    lora = None if reference == "frozen_copy" else LORA
    model = load(family, reference=reference, lora=lora, projector="trained")
    batch = response_batch(model.processor, "chosen", "rejected", "chosen@diffuse")
    before, policy, _ = measure(model, batch)
    assert all(torch.equal(before[view], policy[view].detach()) for view in before)
    stir(model)
    after, policy, _ = measure(model, batch)
    assert all(torch.equal(before[view], after[view]) for view in before)
    assert not any(torch.equal(after[view], policy[view].detach()) for view in after)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_the_order_of_rows_changes_nothing(family):
    model = load(family)
    stir(model)
    _, there, _ = measure(model, response_batch(model.processor, image_counts=MIXED))
    _, back, _ = measure(
        model, response_batch(model.processor, image_counts=MIXED, order=(2, 0, 1))
    )
    assert all(close(there[view][[2, 0, 1]], back[view]) for view in there)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_company_and_its_padding_change_nothing(family):
    model = load(family)
    stir(model)
    _, together, _ = measure(model, response_batch(model.processor, image_counts=MIXED))
    for row in range(3):
        _, alone, _ = measure(
            model, response_batch(model.processor, image_counts=MIXED, order=[row])
        )
        assert all(close(together[view][row], alone[view][0]) for view in together)


@pytest.mark.parametrize(("prefix", "rows"), [("shared", 2), ("repeated", 3)])
def test_every_response_and_condition_runs_once_whatever_the_views(prefix, rows):
    views = ("chosen", "chosen:changed", "rejected", "rejected:changed", "chosen@diffuse")
    model = load(prefix=prefix)
    measure(model, response_batch(model.processor, *views))
    assert model.evaluations == 2 * rows * 3  # models, rows of a sample, samples


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_view_after_the_other_gives_the_same_numbers_and_gradients(checkpointing):
    results = []
    for concatenated in (True, False):
        model = load(gradient_checkpointing=checkpointing and not concatenated)
        stir(model)
        batch = response_batch(model.processor, "chosen", "rejected", "chosen@diffuse")
        likelihood = Tokens(concatenated=concatenated, divergence=True)
        _, policy, row_metadata = measure(model, batch, likelihood)
        (
            policy["chosen"] - policy["rejected"] + row_metadata["chosen"]["divergence"]
        ).sum().backward()
        gradient = torch.cat([p.grad.flatten() for _, p in model.trained_parameters()])
        results.append((policy["chosen@diffuse"], gradient))
    assert close(results[0][0], results[1][0])
    assert close(results[0][1], results[1][1], within=1e-4)


def test_the_number_of_logits_at_once_changes_nothing():
    results = []
    for positions in (1, 1000):
        model = load(positions_at_once=positions)
        stir(model)
        batch = response_batch(model.processor)
        _, policy, _ = measure(model, batch)
        (policy["chosen"] - policy["rejected"]).sum().backward()
        gradient = torch.cat([p.grad.flatten() for _, p in model.trained_parameters()])
        results.append((policy["chosen"], gradient))
    assert close(results[0][0], results[1][0])
    assert close(results[0][1], results[1][1], within=1e-4)


def test_the_head_runs_on_few_tokens_at_a_time():
    sizes = []
    model = load(positions_at_once=4)
    model.network.model.lm_head.register_forward_hook(lambda m, i, o: sizes.append(len(o)))
    batch = response_batch(model.processor)
    _, policy, _ = measure(model, batch)
    policy["chosen"].sum().backward()
    assert max(sizes) == 4


def test_the_divergence_is_that_over_the_vocabulary():
    model = load()
    stir(model, by=0.3)
    batch = response_batch(model.processor)
    likelihood = Tokens(divergence=True)
    _, _, row_metadata = measure(model, batch, likelihood)
    rows = batch.responses["chosen"]
    expected = plain_logits("llava", batch, "chosen").log_softmax(-1)
    whole = model.network.model
    with torch.no_grad():
        output = whole(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask, **batch.image_inputs[None]
        )
    policy = output.logits[:, :-1].log_softmax(-1)
    at_tokens = (expected.exp() * (expected - policy)).sum(-1) * rows.response_mask[:, 1:]
    divergence = row_metadata["chosen"]["divergence"]
    assert close(divergence, at_tokens.sum(1), within=1e-4)
    assert divergence.min() > 0.01
    assert divergence.requires_grad


@pytest.mark.parametrize("reference", ["frozen_copy", "past_policy"])
def test_the_divergence_from_a_reference_with_a_head_of_its_own(reference):
    model = load(reference=reference, lora=None)
    batch = response_batch(model.processor)
    _, _, row_metadata = measure(model, batch, Tokens(divergence=True))
    assert row_metadata["chosen"]["divergence"].abs().max() < 1e-5
    with torch.no_grad():
        model.network.model.lm_head.weight.mul_(2.0)
    _, _, row_metadata = measure(model, batch, Tokens(divergence=True))
    assert row_metadata["chosen"]["divergence"].min() > 0.01


def test_a_mean_divides_by_the_weights_and_has_no_length():
    model = load()
    batch = response_batch(model.processor, "chosen", "chosen:changed")
    _, total, sums = measure(model, batch, Tokens(reduction="sum"))
    _, mean, means = measure(model, batch, Tokens(reduction="mean"))
    for view in total:
        assert close(mean[view], total[view] / sums[view]["length"])
        assert "length" not in means[view]
    weights = batch.weights["chosen:changed"]
    assert close(sums["chosen:changed"]["length"], weights.sum(1))


def test_weights_multiply_tokens():
    model = load()
    batch = response_batch(model.processor, "chosen", "chosen:changed")
    twice = {"chosen:changed": 2.0 * batch.responses["chosen"].response_mask.float()}
    _, policy, _ = measure(model, dataclasses.replace(batch, weights=twice))
    assert close(policy["chosen:changed"], 2 * policy["chosen"])


def test_the_gain_from_images_weighs_tokens():
    likelihood = Tokens(gains={"gain": VisualGain(condition="diffuse")})
    views = ("chosen", "rejected", "chosen:gain", "rejected:gain")
    model = load()
    batch = response_batch(model.processor, *views, likelihood=likelihood)
    _, policy, row_metadata = measure(model, batch, likelihood)

    def per_token(response: str, condition: str | None) -> Tensor:
        rows = batch.responses[response]
        log_probs = plain_logits("llava", batch, response, condition).log_softmax(-1)
        return log_probs.gather(-1, rows.input_ids[:, 1:, None])[..., 0]

    for response, weight in (("chosen", lambda s: 0.5 + s), ("rejected", lambda s: 1.5 - s)):
        clear, disturbed = per_token(response, None), per_token(response, "diffuse")
        mask = batch.responses[response].response_mask[:, 1:]
        weights = weight(torch.sigmoid(clear - disturbed)) * mask
        assert close(policy[f"{response}:gain"], (weights * clear).sum(1))
        assert close(row_metadata[f"{response}:gain"]["length"], weights.sum(1))
    assert close(policy["chosen:gain"][1], policy["chosen"][1])  # without images nothing is gained


def test_own_is_what_the_policy_would_write_next_to_noise_scored_next_to_the_image():
    likelihood = Tokens()
    model = load()
    batch = response_batch(model.processor, "chosen", "rejected", "own", likelihood=likelihood)
    before = model.evaluations
    _, policy, _ = measure(model, batch, likelihood)
    assert model.evaluations - before == 2 * 3 + 3  # one row of both models, and the choice
    chosen = plain_logits("llava", batch, "chosen", "diffuse").argmax(-1, keepdim=True)
    clear = plain_logits("llava", batch, "chosen").log_softmax(-1).gather(-1, chosen)[..., 0]
    mask = batch.responses["chosen"].response_mask[:, 1:]
    assert close(policy["own"], (clear * mask).sum(1))


def test_what_is_made_here_is_asked_of_the_data_by_its_parts():
    likelihood = Tokens(gains={"gain": VisualGain(condition="diffuse")}, own_condition="crop")
    asked = frozenset({"chosen:gain", "rejected:changed", "own", "revised@crop"})
    assert likelihood.data_views(asked) == {
        "chosen",
        "chosen@diffuse",
        "rejected:changed",
        "chosen@crop",
        "revised@crop",
    }
    with pytest.raises(ValueError, match=r"chosen:gain@crop weighs tokens by the gain"):
        likelihood.data_views(frozenset({"chosen:gain@crop"}))


def test_text_alone_leaves_no_trained_parameter_without_gradient():
    model = load(projector="trained")
    _, policy, _ = measure(model, response_batch(model.processor, image_counts=(0, 0)))
    policy["chosen"].sum().backward()
    assert all(parameter.grad is not None for _, parameter in model.trained_parameters())


def test_a_denoiser_is_refused():
    with pytest.raises(ValueError, match=r"set model\.kind to vlm"):
        Tokens().check(SD15(path="anywhere"))


@pytest.mark.parametrize("concatenated", [True, False])
def test_typicality_is_a_mean_over_tokens_of_the_policy_without_gradient(concatenated):
    model = load()
    batch = response_batch(model.processor, image_counts=MIXED)
    likelihood = Tokens(typicality=True, concatenated=concatenated)
    _, policy, row_metadata = measure(model, batch, likelihood)
    for view, rows in batch.responses.items():
        log_probs = plain_logits("llava", batch, view).log_softmax(-1)
        own = log_probs.gather(-1, rows.input_ids[:, 1:, None])[..., 0]
        typical = own - log_probs.exp().square().sum(-1).log()
        mask = rows.response_mask[:, 1:]
        expected = (typical * mask).sum(1) / mask.sum(1)
        found = row_metadata[view]["typicality"]
        assert close(found, expected) and not found.requires_grad
        assert policy[view].requires_grad
    assert Tokens(typicality=True).gives_measured == {"typicality"}
    assert "typicality" not in measure(model, batch)[2]["chosen"]


def test_each_token_by_itself_adds_up_to_the_sum():
    model = load()
    stir(model)
    batch = response_batch(model.processor, image_counts=MIXED)
    old = {name: -torch.rand(rows.input_ids.shape) for name, rows in batch.responses.items()}
    batch = dataclasses.replace(batch, old_log_probs={"chosen": old["chosen"]})
    likelihood = Tokens(each_token=True)
    prepared = likelihood.prepare(model, batch)
    assert likelihood.token_likelihoods(prepared) == {}  # before anything was evaluated
    with torch.no_grad(), model.reference():
        reference = likelihood.evaluate(model, prepared)
    policy = likelihood.evaluate(model, prepared)
    found = likelihood.token_likelihoods(prepared)
    assert likelihood.gives_measured == {"tokens"}
    for view, tokens in found.items():
        mask = batch.responses[view].response_mask
        assert torch.equal(tokens.weights, mask.float())
        assert torch.equal((tokens.policy * tokens.weights).sum(dim=1), policy[view])
        assert tokens.reference is not None
        assert torch.equal((tokens.reference * tokens.weights).sum(dim=1), reference[view])
        assert not tokens.reference.requires_grad
        assert not tokens.policy[~mask].any()
    assert found["chosen"].old is not None and torch.equal(found["chosen"].old, old["chosen"])
    assert found["rejected"].old is None
    found["chosen"].policy[mask_of(batch, "chosen")][0].backward()
    assert any(p.grad.any() for _, p in model.trained_parameters() if p.grad is not None)


def mask_of(batch: Any, response: str) -> Tensor:
    return batch.responses[response].response_mask


def test_tokens_are_given_where_they_are_asked_for():
    model = load()
    batch = response_batch(model.processor)
    likelihood = Tokens()
    prepared = likelihood.prepare(model, batch)
    likelihood.evaluate(model, prepared)
    assert likelihood.token_likelihoods(prepared) == {}
    with pytest.raises(ValueError, match="set reduction to sum"):
        Tokens(each_token=True, reduction="mean")
    with pytest.raises(ValueError, match="token by token"):
        Tokens(each_token=True).check_known_in_advance(frozenset({"chosen"}))
