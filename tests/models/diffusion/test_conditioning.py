from __future__ import annotations

import pytest
import torch

from diffalign.models.diffusion.conditioning import (
    AbstractConditioner,
    PromptEmbeddings,
    PromptEncoder,
)

CPU, SIZE = torch.device("cpu"), (16, 24)


class CountingConditioner(AbstractConditioner):
    """Remembers what it was asked for; a prompt is encoded as its length."""

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
        return {"rows": embeddings.hidden_states.flatten(), "framing": framing}


@pytest.fixture
def conditioner():
    return CountingConditioner()


def guided(encoder, *prompts, guidance=1.0, **options):
    return encoder.guided(prompts, guidance=guidance, size=SIZE, **options)["rows"]


def test_a_prompt_is_encoded_once_and_alone(conditioner):
    encoder = PromptEncoder(conditioner, device=CPU, capacity=2)

    assert guided(encoder, "a", "bcd", "a").tolist() == [1.0, 3.0, 1.0]
    assert guided(encoder, "bcd").tolist() == [3.0]
    assert conditioner.asked == [("a",), ("bcd",)]


def test_of_too_many_prompts_those_used_last_are_kept(conditioner):
    encoder = PromptEncoder(conditioner, device=CPU, capacity=2)

    for prompt in ("a", "b", "a", "c", "a", "b"):
        guided(encoder, prompt)

    assert conditioner.asked == [("a",), ("b",), ("c",), ("b",)]


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, [1, 3]), (1.5, [0, 0, 1, 3])])
def test_under_guidance_the_unconditional_rows_come_first(conditioner, guidance, rows):
    encoder = PromptEncoder(conditioner, device=CPU)

    assert guided(encoder, "a", "bcd", guidance=guidance).tolist() == rows


def test_a_negative_prompt_takes_the_place_of_the_unconditional_row(conditioner):
    encoder = PromptEncoder(conditioner, device=CPU)

    rows = guided(encoder, "a", "bcd", guidance=2.0, negative_prompt="fog!!")

    assert rows.tolist() == [5, 5, 1, 3]
    assert ("",) not in conditioner.asked


def test_the_unconditional_row_is_kept_for_good(conditioner):
    encoder = PromptEncoder(conditioner, device=CPU, capacity=1)

    for prompt in ("a", "b"):
        assert guided(encoder, prompt, guidance=2.0)[0] == 0.0

    assert conditioner.asked.count(("",)) == 1


def test_an_image_that_is_sampled_is_told_as_an_uncropped_file(conditioner):
    framing = PromptEncoder(conditioner, device=CPU).guided(["a"], guidance=2.0, size=SIZE)

    assert framing["framing"].original_sizes.tolist() == [[16, 24]] * 2
    assert framing["framing"].crop_corners.tolist() == [[0, 0]] * 2
    assert framing["framing"].target_size == SIZE


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_what_is_kept_holds_no_graph_and_serves_training(conditioner, mode):
    encoder = PromptEncoder(conditioner, device=CPU)
    with mode():
        guided(encoder, "a", guidance=2.0)

    rows = guided(encoder, "a", guidance=2.0)

    assert not rows.requires_grad
    (torch.ones(2, requires_grad=True) * rows).sum().backward()
