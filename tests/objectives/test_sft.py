from __future__ import annotations

import pytest
import torch

from diffalign import world
from diffalign.objectives.base import Likelihoods
from diffalign.objectives.sft import SFT
from tests.objectives.responses import numbers


def views(sums: list[float], lengths: list[int] | None) -> dict[str, Likelihoods]:
    length = None if lengths is None else torch.tensor(lengths)
    return {"chosen": Likelihoods(numbers(sums).requires_grad_(), length=length)}


def test_every_token_of_the_batch_weighs_alike():
    batch = views([-2.0, -6.0], [1, 7])
    loss = SFT()(batch).loss
    loss.mean().backward()
    assert loss.mean().item() == pytest.approx(8 / 8)
    assert batch["chosen"].policy.grad.tolist() == pytest.approx([-1 / 8, -1 / 8])


def test_or_every_response():
    loss = SFT(per="response")(views([-2.0, -6.0], [1, 6])).loss
    assert loss.tolist() == [2.0, 1.0]


def test_rows_that_are_means_are_taken_as_they_are():
    assert SFT()(views([-2.0, -0.5], None)).loss.tolist() == [2.0, 0.5]


def test_the_tokens_of_all_ranks_count(monkeypatch):
    # Two responses with 8 tokens here, two with 24 elsewhere: a mean length of 8.
    elsewhere = torch.tensor([2.0, 24.0, 0.0, 0.0])
    monkeypatch.setattr(world, "total", lambda mine: mine + elsewhere)
    loss = SFT()(views([-2.0, -6.0], [1, 7])).loss
    assert loss.tolist() == pytest.approx([2 / 8, 6 / 8])
