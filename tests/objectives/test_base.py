from __future__ import annotations

import pytest
import torch

from diffalign.objectives.base import Likelihoods
from diffalign.objectives.dpo import DPO
from diffalign.objectives.pair import pair_metrics


def test_a_log_ratio_without_reference_is_refused():
    with pytest.raises(ValueError, match="needs reference likelihoods"):
        _ = Likelihoods(torch.zeros(2)).log_ratio


def test_pair_metrics_are_detached_and_count_no_opinion_as_half():
    chosen = torch.tensor([1.0, 0.0, -1.0], requires_grad=True)
    metrics = pair_metrics(chosen, torch.zeros(3))
    assert metrics["accuracy"].tolist() == [1.0, 0.5, 0.0]
    assert not any(value.requires_grad for value in metrics.values())


def test_a_loss_remembers_nothing_unless_it_says_so():
    objective = DPO(beta=1.0)
    assert objective.state_dict() == {}
    objective.load_state_dict({})
    with pytest.raises(AssertionError):
        objective.load_state_dict({"mean": torch.zeros(())})
