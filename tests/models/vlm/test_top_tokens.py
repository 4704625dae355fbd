"""Entropy and mass of the most probable tokens: by hand, and at evenly spaced tokens of a pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffalign.models.vlm.token_scores import TOP, TokenScorer, top_token_figures


def test_even_distributions_have_the_entropy_of_their_top_tokens_and_their_share():
    found = top_token_figures(torch.zeros(3, 40, dtype=torch.float64))
    expected = [-TOP / 40 * math.log(1 / 40), TOP / 40]
    assert found.tolist() == pytest.approx(expected)


def test_sure_distributions_have_none_and_all():
    logits = torch.full((2, 5), -40.0)
    logits[:, 3] = 40.0
    assert top_token_figures(logits).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_figures_are_means_over_positions_without_gradient():
    logits = torch.tensor([[0.0, 0.0], [30.0, -30.0]], requires_grad=True)
    found = top_token_figures(logits)
    assert found.tolist() == pytest.approx([math.log(2) / 2, 1.0])
    assert not found.requires_grad


def test_long_passes_are_looked_at_here_and_there():
    scorer = TokenScorer.__new__(TokenScorer)
    nn.Module.__init__(scorer)
    seen = []

    class Model(nn.Module):
        def get_submodule(self, target):
            return lambda hidden: seen.append(hidden[:, 0].tolist()) or hidden

    scorer.model = Model()
    scorer.module_names = type("Names", (), {"head": "head"})()
    scorer.family = type("Family", (), {"softcap": None})()
    scorer.positions_at_once = 4096
    hidden = torch.arange(1000.0)[:, None].expand(1000, 12)
    scorer._top(hidden)
    assert len(seen[0]) == 128
    assert seen[0][:3] == [0, 7, 14]
    scorer.positions_at_once = 4  # no more logits at once than that
    scorer._top(hidden)
    assert seen[1] == [0, 250, 500, 750]
