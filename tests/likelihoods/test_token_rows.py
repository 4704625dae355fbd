"""Log-probabilities of responses that do not all response the same conversation of each sample."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffalign.data.responses.chat import ChatEncoder
from diffalign.data.responses.collate import stack_tokens
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.records import Conversation, Turn
from diffalign.data.responses.samples import TokenSample, TokenSampleMaker
from diffalign.likelihoods.tokens import Tokens
from tests.likelihoods.test_tokens import close, load, measure, stir
from tests.responses import pair

FAMILIES = ["llava", "llava_next", "qwen2_vl"]
OTHER = pair(5, 2)
OWN = Conversation(turns=OTHER.turns, images=OTHER.images)


def batch_of(model, pairs, *views):
    maker = TokenSampleMaker(
        config=ResponseConfig(path="unused"),
        views=frozenset(views or ("chosen", "rejected")),
        run_seed=0,
        encoder=ChatEncoder(model.processor),
    )
    samples = [maker.make(each, 0) for each in pairs]
    assert all(isinstance(sample, TokenSample) for sample in samples), samples
    return stack_tokens(samples, maker.encoder.pad_token_id)


@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_side_with_its_own_conversation_has_the_number_that_it_has_alone(family, concatenated):
    model = load(family)
    stir(model)
    plain = [pair(0, 1), pair(1, 0), pair(2, 2)]
    mixed = [
        dataclasses.replace(plain[0], own={"rejected": OWN}),
        plain[1],
        dataclasses.replace(
            plain[2],
            own={
                "rejected": Conversation(
                    turns=(
                        *plain[2].turns,
                        Turn(role="assistant", text="no"),
                        Turn(role="user", text="Sure?"),
                    ),
                    images=plain[2].images,
                )
            },
        ),
    ]
    alone = [
        dataclasses.replace(each, **vars(each.conversation("rejected")), own={}) for each in mixed
    ]
    likelihood = Tokens(concatenated=concatenated)
    _, found, _ = measure(model, batch_of(model, mixed), likelihood)
    _, chosen, _ = measure(model, batch_of(model, plain, "chosen"))
    _, rejected, _ = measure(model, batch_of(model, alone, "rejected"))
    assert close(found["chosen"], chosen["chosen"])
    assert close(found["rejected"], rejected["rejected"])
    _, before, _ = measure(model, batch_of(model, plain))
    assert not close(found["rejected"][0], before["rejected"][0])
    assert close(found["rejected"][1], before["rejected"][1])


def single(number, image_inputs, side):
    whole = pair(number, image_inputs)
    return dataclasses.replace(whole, responses={side: whole.responses[side]}, paired=False)


@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_response_have_the_numbers_that_they_have_in_pairs(family, concatenated):
    model = load(family)
    stir(model)
    sides = ["rejected", "chosen", "rejected", "rejected"]
    image_inputs = [1, 3, 0, 2]
    mixed = batch_of(model, [single(i, image_inputs[i], side) for i, side in enumerate(sides)])
    reference, found, row_metadata = measure(model, mixed, Tokens(concatenated=concatenated))
    _, whole, known = measure(
        model, batch_of(model, [pair(i, n) for i, n in enumerate(image_inputs)])
    )
    for side, rows in {"chosen": [1], "rejected": [0, 2, 3]}.items():
        assert row_metadata[side]["rows"].tolist() == rows
        assert close(found[side], whole[side][rows])
        assert found[side].requires_grad and reference[side].shape == (len(rows),)
        assert row_metadata[side]["length"].tolist() == known[side]["length"][rows].tolist()


def test_a_view_that_no_row_has_is_empty():
    model = load()
    _, found, row_metadata = measure(
        model, batch_of(model, [single(i, 1, "chosen") for i in range(2)])
    )
    assert found["chosen"].shape == (2,) and found["rejected"].shape == (0,)
    assert (
        row_metadata["rejected"]["rows"].shape == row_metadata["rejected"]["length"].shape == (0,)
    )
    assert row_metadata["rejected"]["rows"].dtype == torch.int64
