"""Attention from a response to images, against what transformers itself gives."""

from __future__ import annotations

import pytest
import torch

from diffalign.data.responses.records import IMAGE, Turn
from diffalign.errors import ModelError
from diffalign.synthesis.attention import attention_to_images, check_layer, layers_of
from tests.responses import random_image
from tests.synthesis.contexts import writer

TURNS = (Turn(role="user", text=f"One {IMAGE} two {IMAGE} what?"),)


def asked(write, tokens=5):
    images = [random_image(n, size=(16, 16)) for n in range(2)]
    request = write.ask(write.prompt(TURNS, images))
    return request, write.write([request], max_new_tokens=tokens)[0]


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_it_is_the_mean_over_heads_and_over_tokens_that_were_read(family):
    write = writer(family)
    request, written = asked(write)
    found = attention_to_images(write, request, written, layer=1)
    network = write.network.model
    network.set_attn_implementation("eager")
    rows = []
    for read in range(1, len(written.tokens)):  # one forward for each token that was read
        inputs = write.inputs([request])
        for name in ("input_ids", "attention_mask", *request.further):
            new = torch.zeros_like(written.tokens[None, :read])
            new = written.tokens[None, :read] if name == "input_ids" else new
            new = torch.ones_like(new) if name == "attention_mask" else new
            inputs[name] = torch.cat([inputs[name], new], dim=1)
        with write.model.inference():
            whole = network(**inputs, output_attentions=True)
        rows.append(whole.attentions[1][0, :, -1, : len(request.input_ids)].mean(dim=0))
    network.set_attn_implementation("sdpa")
    expected = torch.stack(rows).mean(dim=0)[write.image_positions(request)]
    assert len(found) == 2
    assert torch.allclose(torch.cat(found), expected, atol=1e-6)


def test_the_way_of_computing_attention_is_restored():
    write = writer()
    language = write.network.model.get_submodule(write.network.module_names.language)
    before = language.config._attn_implementation
    attention_to_images(write, *asked(write), layer=0)
    assert language.config._attn_implementation == before


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ModelError, match="has 2, 0 to 1"):
        check_layer(writer(), 16)


def test_a_model_that_gives_no_attention_is_refused(monkeypatch):
    write = writer()
    request, written = asked(write)
    attention = layers_of(write)[1].self_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *a, **k: (forward(*a, **k)[0], None))
    with pytest.raises(ModelError, match="gives no attention weights"):
        attention_to_images(write, request, written, layer=1)


def test_an_response_of_one_token_was_never_read():
    write = writer()
    request, written = asked(write, tokens=1)
    with pytest.raises(ValueError, match="never read"):
        attention_to_images(write, request, written, layer=1)
