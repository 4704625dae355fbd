from __future__ import annotations

import pytest
import torch

from diffalign import components
from diffalign.objectives.base import AbstractObjective, Likelihoods, pair_metrics


def test_a_log_ratio_without_reference_is_refused():
    with pytest.raises(ValueError, match="needs reference likelihoods"):
        _ = Likelihoods(torch.zeros(2)).log_ratio


def test_pair_metrics_are_detached_and_count_no_opinion_as_half():
    chosen = torch.tensor([1.0, 0.0, -1.0], requires_grad=True)
    metrics = pair_metrics(chosen, torch.zeros(3))
    assert metrics["accuracy"].tolist() == [1.0, 0.5, 0.0]
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("kind", components.kinds(AbstractObjective))
def test_every_objective_declares_what_it_needs(kind):
    objective = components.find(AbstractObjective, kind)
    assert objective.views and isinstance(objective.needs_reference, bool)
