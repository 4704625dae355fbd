from __future__ import annotations

import torch

from diffalign.training.metrics import Metrics

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def test_means_weigh_every_row_alike_over_uneven_micro_batches():
    metrics = Metrics()
    metrics.add({"loss": torch.tensor([1.0, 2.0, 3.0])})
    metrics.add({"loss": torch.tensor([10.0])})
    metrics.commit(GOOD)
    assert metrics.reduce() == {"loss": 4.0}
    assert metrics.reduce() == {}


def test_a_discarded_step_leaves_no_trace():
    metrics = Metrics()
    metrics.add({"loss": torch.tensor([1.0])})
    metrics.commit(GOOD)
    metrics.add({"loss": torch.tensor([float("nan")])})
    metrics.commit(BAD)
    assert metrics.reduce() == {"loss": 1.0}


def test_a_figure_of_bad_steps_alone_is_left_out():
    metrics = Metrics()
    metrics.add({"loss": torch.tensor([float("inf")])})
    metrics.commit(BAD)
    assert metrics.reduce() == {}


def test_sums_continue_after_a_reload():
    first, second = Metrics(), Metrics()
    first.add({"loss": torch.tensor([1.0])})
    first.commit(GOOD)
    second.load_state_dict(first.state_dict(), torch.device("cpu"))
    second.add({"loss": torch.tensor([3.0])})
    second.commit(GOOD)
    assert second.reduce() == {"loss": 2.0}
