"""Attention block by block: next to one mask over the whole row, and to published values."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from diffalign.models.vlm.block_attention import (
    ARGUMENT,
    NAME,
    Block,
    attend_by_blocks,
    blocks_of,
)
from diffalign.models.vlm.branches import PADDING, Branches, Layout
from tests.models.vlm.test_branches import CHOSEN, REJECTED, TEXT_PROMPT, llama, padded


def by_blocks():
    model = llama()
    attend_by_blocks(model)
    assert model.config._attn_implementation == NAME
    return model


def laid_out(*responses: list[list[int]]) -> tuple[Layout, dict[str, torch.Tensor]]:
    """Rows of which branch n of row i is `responses[n][i]`, and inputs of a model for them."""
    rows = [padded(some) for some in responses]
    layout = Layout.of([ids for ids, _ in rows], [mask for _, mask in rows])
    ids = layout.row([ids for ids, _ in rows])
    return layout, {"input_ids": ids, "attention_mask": (layout.segments != PADDING).long()}


def hidden(model, layout, inputs, *, blocks) -> torch.Tensor:
    """Last hidden states of the tokens that are no padding."""
    told = Branches.of(
        model.model, segments=layout.segments, shifts=layout.shifts, inputs=inputs, parts=blocks
    )
    arguments = {**inputs, **told.arguments()}
    states = model.model(**arguments, use_cache=False).last_hidden_state
    return states[layout.segments != PADDING]


def test_the_blocks_of_rows():
    assert blocks_of([3, 0], [[2, 0, 4], [1, 2]]) == (
        Block(0, 0, 5, context=(0, 0)),
        Block(0, 5, 9, context=(0, 3)),
        Block(1, 0, 1, context=(0, 0)),
        Block(1, 1, 3, context=(0, 0)),
    )


def test_both_responses_have_the_published_values():
    layout, inputs = laid_out([TEXT_PROMPT + CHOSEN], [TEXT_PROMPT + REJECTED])
    model = by_blocks()
    with torch.no_grad():
        logits = model.lm_head(hidden(model, layout, inputs, blocks=layout.blocks()))
    found = []
    for branch, response in enumerate((CHOSEN, REJECTED)):
        own = torch.arange(len(TEXT_PROMPT), len(TEXT_PROMPT) + len(response))
        _, before = layout.before(branch, torch.zeros_like(own), own)
        log_probs = logits[before].log_softmax(-1)
        found.append(float(log_probs.gather(1, torch.tensor(response)[:, None]).sum()))
    assert found == pytest.approx([-16.715428146217, -22.885331853709], abs=2e-6)


ROWS = {
    "two branches": ([[1, 5, 6, 7], [1, 5, 2, 9, 4, 3]], [[1, 5, 8, 9, 2], [1, 5, 2, 9, 7]]),
    "three branches": ([[1, 5, 6, 7]], [[1, 5, 8, 9, 2]], [[1, 5, 3]]),
    "a branch that is empty": ([[1, 5, 6, 7], [3, 4]], [[1, 5, 6], [3, 5, 6]]),
    "nothing in common": ([[1, 5, 6, 7]], [[2, 5, 8]]),
    "no branches": ([[1, 5, 6, 7], [2, 3]],),
}


@pytest.mark.parametrize("case", ROWS)
def test_states_and_gradients_are_those_of_one_mask(case):
    layout, inputs = laid_out(*ROWS[case])
    found = []
    for blocks, build in (((), llama), (layout.blocks(), by_blocks)):
        model = build()
        states = hidden(model, layout, inputs, blocks=blocks)
        (states * torch.sin(torch.arange(states.numel()).view(states.shape))).sum().backward()
        gradient = model.model.layers[0].self_attn.k_proj.weight.grad
        found.append((states.detach(), gradient))
    for masked, own in zip(*found, strict=True):
        assert torch.allclose(masked, own, rtol=1e-5, atol=1e-6)


def test_the_mask_is_not_read_where_there_are_blocks():
    layout, inputs = laid_out(*ROWS["two branches"])
    model = by_blocks()
    told = Branches.of(
        model.model,
        segments=torch.zeros_like(layout.segments),
        shifts=layout.shifts,
        inputs=inputs,
        parts=layout.blocks(),
    )
    assert ARGUMENT in told.arguments()
    with torch.no_grad():
        right = hidden(model, layout, inputs, blocks=layout.blocks())
        states = model.model(**{**inputs, **told.arguments()}, use_cache=False).last_hidden_state
    assert torch.equal(states[layout.segments != PADDING], right)


def test_rows_that_are_told_no_blocks_attend_as_ever():
    _, inputs = laid_out(*ROWS["no branches"])
    with torch.no_grad():
        expected = llama()(**inputs).logits
        assert torch.equal(by_blocks()(**inputs).logits, expected)


def test_recomputing_in_the_backward_pass_gives_the_same_gradient():
    layout, inputs = laid_out(*ROWS["two branches"])
    gradients = []
    for checkpointing in (False, True):
        model = by_blocks().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        hidden(model, layout, inputs, blocks=layout.blocks()).square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-6, atol=1e-9)


def test_a_model_with_another_attention_stays_as_it_is():
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    attend_by_blocks(model)
    assert model.config._attn_implementation == "eager"
