"""Rows one after the other in one sequence: the numbers and gradients of rows by themselves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import Any

import pytest
import torch

from diffalign.likelihoods.tokens import Tokens, VisualGain
from diffalign.models.lora import LoraSettings
from diffalign.models.vlm import branches
from diffalign.models.vlm.block_attention import Block
from tests.likelihoods.test_prefix import MDPO, MIXED, assert_the_same, folder, load, settings, step
from tests.likelihoods.test_token_rows import batch_of, single
from tests.responses import response_batch

ALL = 10_000
"""More tokens than any batch of here has."""


def three_ways(
    batch_of: Any, likelihood: Tokens | None = None, *, pack_to: int = ALL, **changes: Any
) -> Any:
    """A step of plain rows, and the model and step of packed ones, repeated and shared."""
    model = load(**changes, prefix="repeated")
    plain = step(model, batch_of(model.processor), likelihood)
    found = []
    for prefix in ("repeated", "shared"):
        model = load(**changes, prefix=prefix)
        batch = dataclasses.replace(batch_of(model.processor), pack_to=pack_to)
        found.append((model, step(model, batch, likelihood)))
        assert not model.remarks()
    return plain, *found


@pytest.mark.parametrize("image_counts", [MIXED, (1, 1), (3, 3), (0, 0)])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl"])
def test_packed_rows_are_plain_rows(family, image_counts):
    plain, (repeated, apart), (shared, together) = three_ways(
        lambda processor: response_batch(processor, *MDPO, image_counts=image_counts),
        family=family,
    )
    assert_the_same(apart, plain)
    assert_the_same(together, plain)
    # one sequence of all rows; of shared ones, one of the pairs and one of the third view
    assert (repeated.evaluations, shared.evaluations) == (2, 2 * 2)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "lora": None, "reference": "frozen_copy"},
        {"projector": "trained", "one_vision_pass": False},
    ],
    ids=["checkpointing", "checkpointing, full", "projector"],
)
def test_whatever_trains_and_is_recomputed(family, changes):
    plain, (_, apart), (_, together) = three_ways(
        lambda processor: response_batch(processor, *MDPO, image_counts=(1, 3, 0)),
        family=family,
        **changes,
    )
    assert_the_same(apart, plain)
    assert_the_same(together, plain)


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
    ],
    ids=["divergence and typicality", "weights, mean", "gain", "own"],
)
def test_whatever_is_measured(likelihood, views):
    plain, (_, apart), (_, together) = three_ways(
        lambda processor: response_batch(
            processor, *views, image_counts=MIXED, likelihood=likelihood
        ),
        likelihood,
        family="qwen2_vl",
    )
    assert_the_same(apart, plain)
    assert_the_same(together, plain)


@pytest.mark.parametrize("pack_to", [100, 170])
def test_a_sequence_has_no_more_tokens_than_it_may_and_the_rest_is_another(pack_to):
    model = load("llava", prefix="repeated")
    batch = response_batch(model.processor, image_counts=(1, 0, 1, 0))
    packed = dataclasses.replace(batch, pack_to=pack_to)
    (rows,) = Tokens().prepare(model, packed).groups
    plain = [part.attention_mask.sum(1) for part in batch.responses.values()]
    lengths = torch.cat(plain).tolist()
    assert int(rows.attention_mask.sum()) == sum(lengths)
    assert max(rows.attention_mask.sum(1).tolist()) <= max(pack_to, *lengths)
    assert 1 < len(rows) < len(lengths)
    padding = Tokens().figures(Tokens().prepare(model, packed))["padding"].mean()
    before = Tokens().figures(Tokens().prepare(model, batch))["padding"].mean()
    assert padding == pytest.approx(1 - sum(lengths) / rows.input_ids.numel())
    assert before == pytest.approx(1 - sum(lengths) / (len(lengths) * max(lengths)))
    plain, (_, apart), _ = three_ways(
        lambda processor: response_batch(processor, image_counts=(1, 0, 1, 0)), pack_to=pack_to
    )
    assert_the_same(apart, plain)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("concatenated", [True, False])
def test_rows_of_one_response_are_packed_as_well(family, concatenated):
    sides, images = ("rejected", "chosen", "rejected", "rejected"), (1, 3, 0, 2)
    likelihood = Tokens(concatenated=concatenated)
    found = []
    for pack_to in (None, ALL):
        model = load(family)
        samples = [single(n, images[n], side) for n, side in enumerate(sides)]
        batch = dataclasses.replace(batch_of(model, samples), pack_to=pack_to)
        prepared = likelihood.prepare(model, batch)
        with torch.no_grad(), model.reference():
            reference = likelihood.evaluate(model, prepared)
        policy = likelihood.evaluate(model, prepared)
        (policy["rejected"].sum() - policy["chosen"].sum()).backward()
        gradient = torch.cat([p.grad.flatten() for _, p in model.trained_parameters()])
        found.append((policy, reference, gradient))
        rows = [len(group) for group in prepared.groups]
        packed = [1] if concatenated else [1, 1]
        assert rows == (packed if pack_to else ([4] if concatenated else [1, 3]))
    assert_the_same(found[1], found[0])


def test_dropout_of_an_adapter_keeps_responses_apart_and_rows_may_be_packed():
    dropped = LoraSettings(rank=2, dropout=0.1)
    model = load(lora=dropped)
    assert not model.shares_prefix and model.packs_up_to(7) == 7
    assert Tokens().packing_obstacle(settings(lora=dropped)) is None


def test_a_sequence_may_be_longer_than_the_context_of_which_every_row_has_its_own(tmp_path):
    short = tmp_path / "short"
    shutil.copytree(folder("llava"), short)
    content = json.loads((short / "config.json").read_text())
    content["text_config"]["max_position_embeddings"] = 64
    (short / "config.json").write_text(json.dumps(content))
    plain, (model, packed), _ = three_ways(
        lambda processor: response_batch(processor, image_counts=(1, 0, 1, 0)), path=str(short)
    )
    assert model.network.model.config.text_config.max_position_embeddings == 64
    assert_the_same(packed, plain)


# --- where it cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["shared", "repeated"])
def test_rows_that_see_each_other_are_found_out_at_the_first_batch(prefix, monkeypatch):
    expected, _, _ = step(
        load("qwen2_vl", prefix="repeated"),
        response_batch(load("qwen2_vl").processor, *MDPO, image_counts=MIXED),
    )
    monkeypatch.setattr(branches, "same_row", lambda rows: torch.ones_like(rows[:, None, None] > 0))
    monkeypatch.setattr(Block, "moved", lambda part, row, by: dataclasses.replace(part, row=row))
    model = load("qwen2_vl", prefix=prefix)
    batch = response_batch(model.processor, *MDPO, image_counts=MIXED)
    found, _, _ = step(model, dataclasses.replace(batch, pack_to=ALL))
    assert not model.prefix_agrees
    (said,) = model.remarks()
    assert "no rows are packed" in said
    assert all(torch.allclose(found[v], expected[v], rtol=1e-5, atol=1e-5) for v in MDPO)


def test_an_attention_that_takes_no_such_mask_is_told_once():
    model = load()
    model._packs_rows = False
    batch = dataclasses.replace(response_batch(model.processor), pack_to=ALL)
    for _ in range(2):
        (rows,) = Tokens().prepare(model, batch).groups
        assert len(rows) == 3
    (said,) = model.remarks()
    assert "rows are not packed" in said
