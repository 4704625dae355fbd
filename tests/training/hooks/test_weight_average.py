from __future__ import annotations

import torch
from torch import nn

from diffalign.training.hooks.weight_average import WeightAverage


def test_the_average_keeps_a_share_of_decay_and_takes_the_rest():
    weight = nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage([("w", weight)], decay=0.9)
    with torch.no_grad():
        weight.fill_(2.0)
    average.update(torch.tensor(True))
    assert average.state_dict()["w"].tolist() == [torch.tensor(0.9 * 1.0 + 0.1 * 2.0).item()]
    average.update(torch.tensor(True))
    expected = 0.9 * (0.9 * 1.0 + 0.1 * 2.0) + 0.1 * 2.0
    assert torch.allclose(average.state_dict()["w"], torch.tensor([expected]))


def test_weights_that_did_not_move_leave_it_as_it_was():
    weight = nn.Parameter(torch.tensor([1.0, -3.0]))
    average = WeightAverage([("w", weight)], decay=0.9)
    with torch.no_grad():
        weight.fill_(2.0)  # so that a step towards it would show
    average.update(torch.tensor(False))
    assert average.state_dict()["w"].tolist() == [1.0, -3.0]


def test_it_starts_at_the_weights_and_follows_a_saved_state():
    weight = nn.Parameter(torch.tensor([3.0]))
    average = WeightAverage([("w", weight)], decay=0.5)
    assert average.state_dict()["w"].tolist() == [3.0]
    average.load_state_dict({"w": torch.tensor([7.0])})
    assert average.state_dict()["w"].tolist() == [7.0]
    assert weight.item() == 3.0
