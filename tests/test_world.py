from __future__ import annotations

import torch

from diffalign import world


def test_without_a_process_group_there_is_a_world_of_one():
    assert (world.rank(), world.size(), world.is_main()) == (0, 1, True)


def test_the_total_of_one_rank_is_a_copy_of_its_own_values():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    total = world.total(values)
    assert total.tolist() == [1.0, 2.0] and not total.requires_grad
    total += 1
    assert values.tolist() == [1.0, 2.0]


def test_the_mean_counts_the_elements_of_every_rank(monkeypatch):
    values = torch.tensor([1.0, 3.0], requires_grad=True)
    assert world.mean(values).item() == 2.0 and not world.mean(values).requires_grad
    # Another rank holds three elements that sum to 11.
    monkeypatch.setattr(world, "total", lambda mine: mine.detach() + torch.tensor([11.0, 3.0]))
    assert world.mean(values).item() == 3.0


def test_the_rows_of_one_rank_are_its_own_without_gradient():
    values = torch.tensor([[1.0, 2.0]], requires_grad=True)
    joined = world.joined(values)
    assert joined.tolist() == [[1.0, 2.0]] and not joined.requires_grad
