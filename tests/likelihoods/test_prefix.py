"""Image and prompt computed once: the numbers and gradients of rows for every response."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.data.batches import TokenRows
from diffalign.data.responses.chat import ChatEncoder
from diffalign.data.responses.collate import stack_tokens
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.records import IMAGE, Conversation, Turn
from diffalign.data.responses.samples import TokenSample, TokenSampleMaker
from diffalign.errors import ModelError
from diffalign.likelihoods.tokens import Tokens, VisualGain
from diffalign.models.lora import LoraSettings
from diffalign.models.vlm.branches import Branches
from diffalign.models.vlm.config import VLM
from tests.responses import pair, response_batch
from tests.tiny_vlm import tiny_llava, tiny_llava_next, tiny_qwen2_5_vl, tiny_qwen2_vl

FAMILIES = {
    "llava": tiny_llava,
    "llava_next": tiny_llava_next,
    "qwen2_vl": tiny_qwen2_vl,
    "qwen2_5_vl": tiny_qwen2_5_vl,
}
MIXED = (1, 0, 3)
"""Images of three samples."""
PAIR = ("chosen", "rejected")
MDPO = (*PAIR, "chosen@diffuse")


@cache
def folder(family: str) -> Path:
    return FAMILIES[family](Path(mkdtemp()))


def settings(family: str = "llava", **changes: Any) -> VLM:
    known = {"path": str(folder(family)), "lora": LoraSettings(rank=2), "positions_at_once": 5}
    return VLM(**{**known, **changes})


def load(
    family: str = "llava",
    *,
    reference: Any = "adapter_off",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    model = settings(family, **changes).load(
        device=torch.device("cpu"), compute_dtype=dtype, reference=reference
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the policy is not where it started
        for _, parameter in model.trained_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def step(model: Any, batch: Any, likelihood: Tokens | None = None) -> tuple[Any, Any, Tensor]:
    """(policy, reference, gradient) of a DPO loss with a term for every other view."""
    likelihood = likelihood or Tokens()
    prepared = likelihood.prepare(model, batch)
    with torch.no_grad(), model.reference():
        reference = likelihood.evaluate(model, prepared)
    policy = likelihood.evaluate(model, prepared)
    ratio = {view: policy[view] - reference[view] for view in policy}
    others = [ratio[view] for view in ratio if view != "chosen"]
    loss = sum(torch.nn.functional.softplus(other - ratio["chosen"]).mean() for other in others)
    for known in likelihood.row_metadata(prepared).values():
        if "divergence" in known:
            loss = loss + known["divergence"].sum()
    loss.backward()
    gradient = [p.grad.flatten() for _, p in model.trained_parameters()]
    return policy, {**reference, "loss": loss.detach()}, torch.cat(gradient)


def assert_the_same(shared: Any, repeated: Any) -> None:
    """Losses to 1e-5; gradients to 1e-4 of the largest."""
    for ours, theirs in zip(shared[:2], repeated[:2], strict=True):
        for view in theirs:
            assert torch.allclose(ours[view], theirs[view], rtol=1e-5, atol=1e-5), view
    difference = (shared[2] - repeated[2]).abs().max()
    assert difference < 1e-4 * repeated[2].abs().max()


def both_ways(batch_of: Any, likelihood: Tokens | None = None, **changes: Any) -> list[Any]:
    """The models and steps of shared and of repeated rows; `batch_of` takes a processor."""
    found = []
    for prefix in ("shared", "repeated"):
        model = load(**changes, prefix=prefix)
        found.append((model, step(model, batch_of(model.processor), likelihood)))
        assert not model.remarks()
    return found


@pytest.mark.parametrize("image_counts", [MIXED, (1, 1), (3, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_rows_are_repeated_rows(family, image_counts):
    (model, shared), (other, repeated) = both_ways(
        lambda processor: response_batch(processor, *MDPO, image_counts=image_counts),
        family=family,
    )
    assert_the_same(shared, repeated)
    rows = len(image_counts)
    assert (model.evaluations, other.evaluations) == (2 * 2 * rows, 2 * 3 * rows)


def test_a_batch_of_text_alone_is_shared():
    (_, shared), (_, repeated) = both_ways(
        lambda processor: response_batch(processor, image_counts=(0, 0)), family="qwen2_vl"
    )
    assert_the_same(shared, repeated)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "lora": None, "reference": "frozen_copy"},
        {"lora": None, "reference": "frozen_copy", "projector": "trained"},
        {"projector": "trained", "one_vision_pass": False},
    ],
    ids=["checkpointing", "checkpointing, full", "full", "projector"],
)
def test_whatever_trains_and_is_recomputed(family, changes):
    (_, shared), (_, repeated) = both_ways(
        lambda processor: response_batch(processor, *MDPO, image_counts=(1, 3)),
        family=family,
        **changes,
    )
    assert_the_same(shared, repeated)


@pytest.mark.parametrize(
    ("likelihood", "views"),
    [
        (Tokens(divergence=True, typicality=True), MDPO),
        (Tokens(reduction="mean"), ("chosen:changed", "chosen", "rejected:changed")),
        (
            Tokens(gains={"gain": VisualGain(condition="diffuse")}),
            ("chosen", "chosen:gain", "rejected:gain"),
        ),
        (Tokens(), ("chosen", "own", "rejected")),
        (Tokens(), (*MDPO, "rejected@diffuse")),
    ],
    ids=["divergence and typicality", "weights, mean", "gain", "own", "two pairs"],
)
def test_whatever_is_measured(likelihood, views):
    (_, shared), (_, repeated) = both_ways(
        lambda processor: response_batch(
            processor, *views, image_counts=MIXED, likelihood=likelihood
        ),
        likelihood,
        family="qwen2_vl",
    )
    assert_the_same(shared, repeated)


def test_more_than_two_responses_are_branches_of_one_row():
    def three(processor: Any) -> Any:
        batch = response_batch(processor, image_counts=(1, 1, 1))
        cat, dog = batch.responses["chosen"], batch.responses["rejected"]
        width = min(cat.input_ids.shape[1], dog.input_ids.shape[1])
        cut = TokenRows(
            input_ids=dog.input_ids[:, :width],
            attention_mask=dog.attention_mask[:, :width],
            response_mask=dog.response_mask[:, :width],
            further={key: value[:, :width] for key, value in dog.further.items()},
        )
        return dataclasses.replace(
            batch,
            responses={**batch.responses, "revised": cut},
            views=frozenset({"chosen", "rejected", "revised"}),
        )

    (model, shared), (_, repeated) = both_ways(three, family="qwen2_5_vl")
    assert_the_same(shared, repeated)
    assert model.evaluations == 2 * 3


@pytest.mark.parametrize(
    ("family", "question", "rows"),
    [
        ("llava", f"{IMAGE}\nWhat is not there?", 1),
        ("llava", f"Where is it?{IMAGE}", 1),  # its template writes images first
        ("qwen2_vl", f"{IMAGE}\nWhat is not there?", 1),
        ("qwen2_vl", f"Where is it?{IMAGE}", 2),
    ],
)
def test_questions_may_differ_after_the_image(family, question, rows):
    def asked_differently(processor: Any) -> Any:
        maker = TokenSampleMaker(
            config=ResponseConfig(path="unused"),
            views=frozenset(PAIR),
            run_seed=0,
            encoder=ChatEncoder(processor),
        )
        first, second = pair(0, 1), pair(1, 1)
        turns = (Turn(role="user", text=question),)
        own = {"rejected": Conversation(turns=turns, images=second.images)}
        samples = [maker.make(first, 0), maker.make(dataclasses.replace(second, own=own), 0)]
        assert all(isinstance(sample, TokenSample) for sample in samples), samples
        return stack_tokens(samples, maker.encoder.pad_token_id)

    (model, shared), (_, repeated) = both_ways(asked_differently, family=family)
    assert_the_same(shared, repeated)
    assert model.evaluations == 2 * rows * 2


def test_the_tower_runs_once_and_few_tokens_go_through_the_language_model():
    sizes: dict[str, list[int]] = {}
    for prefix in ("shared", "repeated"):
        model = load(prefix=prefix)
        likelihood, batch = Tokens(), response_batch(model.processor, image_counts=MIXED)
        likelihood.prepare(model, batch)  # with the comparison
        calls: list[int] = []
        tower = model.network.tower
        encoder = getattr(tower, "vision_model", tower).encoder  # of transformers before 5
        encoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        prepared = likelihood.prepare(model, batch)
        assert len(calls) == 1
        sizes[prefix] = [int(rows.attention_mask.sum()) for rows in prepared.groups]
    prompts = int((batch.responses["chosen"].response_mask.cumsum(1) == 0).sum())
    saved = sum(sizes["repeated"]) - sum(sizes["shared"])
    assert saved >= prompts - 3  # a row's padding counts above as well


def test_the_reference_of_repeated_rows_serves_shared_ones():
    """As `reference: cached` does, whichever way its values were computed."""
    (model, shared), (_, repeated) = both_ways(lambda processor: response_batch(processor, *MDPO))
    for view in MDPO:
        assert torch.allclose(shared[1][view], repeated[1][view], rtol=1e-5, atol=1e-5)
    assert settings(prefix="shared").policy_fingerprint() == settings().policy_fingerprint()
    assert load(prefix="repeated").fingerprint() == model.fingerprint()


# --- where it cannot be ---------------------------------------------------------------------------


def miscounted(monkeypatch: Any) -> None:
    """Make positions count on through both responses, as they do by default."""
    plain = Branches.of
    monkeypatch.setattr(
        Branches,
        "of",
        lambda model, **k: plain(model, **{**k, "shifts": torch.zeros_like(k["shifts"])}),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_gives_other_numbers_is_found_out_at_the_first_batch(dtype, monkeypatch):
    honest = load("qwen2_vl", dtype=dtype)
    batch = response_batch(honest.processor, *MDPO, image_counts=MIXED)
    Tokens().prepare(honest, batch)
    assert honest.prefix_agrees and not honest.remarks()

    expected, _, _ = step(load("qwen2_vl", dtype=dtype, prefix="repeated"), batch)
    miscounted(monkeypatch)
    model = load("qwen2_vl", dtype=dtype)
    found, _, _ = step(model, batch)
    assert not model.prefix_agrees
    (said,) = model.remarks()
    assert "as with model.prefix=repeated" in said
    assert not model.remarks()
    limit = 1e-5 if dtype == torch.float32 else 0.2
    assert all(torch.allclose(found[v], expected[v], rtol=limit, atol=limit) for v in MDPO)


def test_the_comparison_is_made_once_and_counts_no_rows(monkeypatch):
    model = load()
    made: list[int] = []
    plain = model.check_prefix
    monkeypatch.setattr(model, "check_prefix", lambda *a: made.append(1) or plain(*a))
    batch = response_batch(model.processor)
    for _ in range(2):
        Tokens().prepare(model, batch)
    assert made == [1] and model.evaluations == 0


def test_scores_that_a_mask_is_added_to_are_the_same():
    """Of eager attention, which would take a mask of yes and no for numbers."""
    found = []
    for prefix in ("shared", "repeated"):
        model = load("qwen2_vl", prefix=prefix)
        model.network.model.set_attn_implementation("eager")
        found.append(step(model, response_batch(model.processor, *MDPO, image_counts=(1, 3))))
        assert model.shares_prefix == (prefix == "shared") and not model.remarks()
    assert_the_same(*found)


def test_an_attention_that_takes_no_such_mask_is_found_out():
    model = load()
    network = model.network
    network.model.config.get_text_config()._attn_implementation = "flex_attention"
    again = type(model)(
        network=network,
        reference=None,  # type: ignore[arg-type]
        processor=model.processor,
        device=model.device,
        compute_dtype=torch.float32,
        shares_vision=True,
        shares_prefix=True,
        rates={},
        fingerprint="",
        export=lambda *_: None,
    )
    assert not again.shares_prefix
    assert "attends by flex_attention" in again.remarks()[0]


def test_one_view_after_the_other_is_repeated():
    model = load()
    likelihood = Tokens(concatenated=False)
    likelihood.prepare(model, response_batch(model.processor))
    prepared = likelihood.prepare(model, response_batch(model.processor))
    assert [rows.branches for rows in prepared.groups] == [None, None]
    assert likelihood.note(settings()).endswith("since likelihood.concatenated is false")
    with pytest.raises(ValueError, match=r"concatenated is false.*and model\.prefix is shared"):
        likelihood.check(settings(prefix="shared"))


def test_what_cannot_be_shared_is_refused_where_it_is_asked_for():
    dropped = LoraSettings(rank=2, dropout=0.1)
    with pytest.raises(ModelError, match="prefix is shared, but dropout of an adapter"):
        settings(prefix="shared", lora=dropped).check()
    settings(prefix="shared").check()
    assert "dropout" in Tokens().note(settings(lora=dropped))
    assert not load(lora=dropped).shares_prefix
    assert Tokens().note(settings()).startswith("shared: ")
    assert Tokens().note(settings(prefix="repeated")).endswith("since model.prefix is repeated")
