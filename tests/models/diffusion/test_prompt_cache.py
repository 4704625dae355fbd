from __future__ import annotations

import pytest
import torch

from diffalign.models.diffusion.conditioning import AbstractConditioner, PromptEmbeddings
from diffalign.models.diffusion.prompt_cache import PromptCache


class CountingConditioner(AbstractConditioner):
    """Remembers what it was asked for."""

    def __init__(self):
        self.asked = []
        self.weight = torch.ones(1, requires_grad=True)

    def encode(self, prompts):
        self.asked.append(tuple(prompts))
        rows = [float(len(prompt)) for prompt in prompts]
        return PromptEmbeddings(hidden_states=self.weight * torch.tensor(rows).reshape(-1, 1, 1))

    def unconditional(self):
        return self.encode([""])

    def arguments(self, embeddings, framing):
        return {}


@pytest.fixture
def conditioner():
    return CountingConditioner()


def test_a_prompt_is_encoded_once_and_alone(conditioner):
    cache = PromptCache(conditioner, capacity=2)

    rows = [cache.encode(prompt).hidden_states.item() for prompt in ("a", "bcd", "a", "bcd")]

    assert rows == [1.0, 3.0, 1.0, 3.0]
    assert conditioner.asked == [("a",), ("bcd",)]


def test_of_too_many_prompts_those_used_last_are_kept(conditioner):
    cache = PromptCache(conditioner, capacity=2)

    for prompt in ("a", "b", "a", "c", "a", "b"):
        cache.encode(prompt)

    assert conditioner.asked == [("a",), ("b",), ("c",), ("b",)]


def test_the_unconditional_row_is_kept_for_good(conditioner):
    cache = PromptCache(conditioner, capacity=1)

    for prompt in ("a", "b"):
        cache.encode(prompt)
        assert cache.unconditional().hidden_states.item() == 0.0

    assert conditioner.asked.count(("",)) == 1


def test_what_is_kept_holds_no_graph(conditioner):
    cache = PromptCache(conditioner, capacity=1)

    assert not cache.encode("a").hidden_states.requires_grad
    assert not cache.unconditional().hidden_states.requires_grad
