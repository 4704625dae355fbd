from __future__ import annotations

import torch

from diffalign.training.metrics import Metrics


def test_means_weigh_every_row_alike_over_uneven_micro_batches():
    metrics = Metrics()
    metrics.add({"loss": torch.tensor([1.0, 2.0, 3.0])})
    metrics.add({"loss": torch.tensor([10.0])})
    metrics.commit()
    assert metrics.reduce() == {"loss": 4.0}
    assert metrics.reduce() == {}


def test_a_discarded_step_leaves_no_trace():
    metrics = Metrics()
    metrics.add({"loss": torch.tensor([1.0])})
    metrics.commit()
    metrics.add({"loss": torch.tensor([float("nan")])})
    metrics.discard()
    assert metrics.reduce() == {"loss": 1.0}


def test_sums_continue_after_a_reload():
    first, second = Metrics(), Metrics()
    first.add({"loss": torch.tensor([1.0])})
    first.commit()
    second.load_state_dict(first.state_dict(), torch.device("cpu"))
    second.add({"loss": torch.tensor([3.0])})
    second.commit()
    assert second.reduce() == {"loss": 2.0}
