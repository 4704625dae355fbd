"""What a model writes: from the beginning or the middle, alone or in company, seeing or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffalign.data.responses.records import IMAGE, Turn
from diffalign.data.skipping import UnusableRowError
from diffalign.generation.writing import _OwnSamples, most_probable, perplexity
from tests.responses import random_image
from tests.synthesis.contexts import model, writer

FAMILIES = ("llava", "llava_next", "qwen2_vl")
TURNS = (Turn(role="user", text=f"{IMAGE}\nWhat is it?"),)


def prompts(write, count=3):
    sizes = [(20, 12), (12, 24), (16, 16)]
    return [write.prompt(TURNS, [random_image(n, size=sizes[n % 3])]) for n in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_greedy_response_is_that_of_the_model(family):
    write = writer(family)
    images = [random_image(n, size=(20, 12)) for n in range(2)]
    encoded = [write.prompt(TURNS, [image]) for image in images]
    texts = [some.text for some in encoded]
    expected = model(family).generate(texts, [[image] for image in images], max_new_tokens=6)
    written = write.write([write.ask(some) for some in encoded], max_new_tokens=6)
    assert [some.text.strip() for some in written] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_company_changes_no_sample(family):
    write = writer(family)
    requests = [write.ask(some, seed=n) for n, some in enumerate(prompts(write))]
    together = write.write(requests, max_new_tokens=6, temperature=1.0)
    alone = [write.write([r], max_new_tokens=6, temperature=1.0)[0] for r in requests]
    assert [some.text for some in together] == [some.text for some in alone]
    other = write.write([replace(requests[0], seed=99)], max_new_tokens=6, temperature=1.0)
    assert other[0].text != alone[0].text


def test_samples_follow_the_probabilities():
    scores = torch.tensor([[1.0, 0.0, -torch.inf]]).repeat(3000, 1)
    sampled = _OwnSamples(range(3000), temperature=2.0)(None, scores).argmax(dim=1)
    expected = 1 / (1 + torch.tensor(-0.5).exp())
    assert (sampled == 0).float().mean() == pytest.approx(float(expected), abs=0.03)
    assert (sampled != 2).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_response_goes_on_from_its_exact_tokens(family):
    write = writer(family)
    (prompt,) = prompts(write, 1)
    request = write.go_on(prompt, "a red cat ")
    whole = write.encoder.response(prompt, "a red cat")
    started = request.input_ids[request.response_start :]
    assert torch.equal(started, whole.tokens[: len(started)])
    assert write.model.processor.tokenizer.decode(started).strip() == "a red cat"
    assert all(len(values) == len(request.input_ids) for values in request.further.values())
    assert len(write.write([request], max_new_tokens=3)[0].tokens) <= 3


def test_nothing_started_asks_for_the_whole():
    write = writer()
    (prompt,) = prompts(write, 1)
    assert torch.equal(write.go_on(prompt, " ").input_ids, prompt.input_ids)


def test_one_sentence_ends_with_its_first_full_stop():
    write = writer(batch_size=16)
    (prompt,) = prompts(write, 1)
    requests = [write.ask(prompt, seed=seed) for seed in range(16)]
    written = write.write(requests, max_new_tokens=80, temperature=3.0, one_sentence=True)
    ended = [some.text for some in written if "." in some.text]
    assert len(ended) > 2
    assert all(text.index(".") == len(text) - 1 for text in ended)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_hidden_decides_nothing(family):
    write = writer(family)
    images = [random_image(n, size=(16, 16)) for n in (1, 2)]
    requests = [write.ask(write.prompt(TURNS, [image])) for image in images]
    seen = write.write(requests, max_new_tokens=4)
    count = len(write.image_positions(requests[0]))
    blind = [replace(some, hidden=torch.ones(count, dtype=torch.bool)) for some in requests]
    unseen = write.write(blind, max_new_tokens=4)
    assert not torch.allclose(seen[0].confidence, seen[1].confidence)
    assert torch.equal(unseen[0].tokens, unseen[1].tokens)
    assert torch.allclose(unseen[0].confidence, unseen[1].confidence, atol=1e-6)


def test_hidden_tokens_leave_all_others_where_they_are():
    """A forward counts positions without the mask; `generate` would count them from its holes."""
    write = writer()
    request = write.ask(prompts(write, 1)[0])
    positions = write.image_positions(request)
    hidden = torch.tensor([True, False, True, True])
    inputs = write.inputs([request])
    inputs["attention_mask"][0, positions[hidden]] = 0
    with write.model.inference():
        logits = write.network.model(**inputs).logits[:, -1]
    logits[:, write.model.placeholders] = -torch.inf
    written = write.write([replace(request, hidden=hidden)], max_new_tokens=1)[0]
    assert float(written.confidence[0]) == pytest.approx(float(most_probable(logits)), abs=1e-5)
    plain = write.write([request], max_new_tokens=1)[0]
    assert float(plain.confidence[0]) != pytest.approx(float(written.confidence[0]), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_moves_no_hole(family):
    write = writer(family)
    (prompt,) = prompts(write, 1)
    short, long = write.ask(prompt), write.go_on(prompt, "a red cat sits")
    hidden = torch.arange(len(write.image_positions(short))) % 2 == 0
    both = [replace(short, hidden=hidden), replace(long, hidden=hidden)]
    together = write.write(both, max_new_tokens=4)
    for request, some in zip(both, together, strict=True):
        (alone,) = write.write([request], max_new_tokens=4)
        assert torch.allclose(alone.confidence, some.confidence, atol=1e-5)


def test_hiding_nothing_changes_nothing():
    write = writer()
    requests = [write.ask(some) for some in prompts(write)]
    shown = [replace(some, hidden=torch.zeros(4, dtype=torch.bool)) for some in requests]
    plain = write.write(requests, max_new_tokens=4)
    assert [some.text for some in write.write(shown, max_new_tokens=4)] == [s.text for s in plain]


def test_what_the_context_does_not_hold_is_refused():
    write = writer()
    request = write.ask(prompts(write, 1)[0])
    write.check_length(request, 512 - len(request.input_ids))
    with pytest.raises(UnusableRowError, match=r"takes 512\. Lower .*max_new_tokens"):
        write.check_length(request, 513 - len(request.input_ids))


def test_perplexity_is_that_of_the_authors_code():
    logits = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    assert perplexity(most_probable(logits)) == pytest.approx(1.734588, abs=1e-6)


def test_mean_hidden_states_ignore_padding():
    write = writer()
    together = write.hidden_states(["a cat", "a much longer text"])
    assert torch.allclose(together[:1], write.hidden_states(["a cat"]), atol=1e-5)


def test_an_empty_text_has_a_state_too():
    states = writer("qwen2_vl").hidden_states([""])
    assert states.shape[0] == 1 and states.isfinite().all()
