from __future__ import annotations

import itertools
import math

import pytest
import torch

from diffalign import world
from diffalign.objectives.base import Likelihoods
from diffalign.objectives.bradley_terry import BradleyTerry, bradley_terry_divergence
from tests.objectives.fixtures import normal

PUBLISHED = {
    # Values of the authors' own criterion, in float64: scale of the cosine similarities -> loss.
    10.0: 2.202952042782,
    100.0: 21.974872374322,
}
LABELS = [1.0, 0.0, 0.5, 1.0]
"""Probability that the first image is preferred."""
EXAMPLES_PER_PROMPT = [1, 2, 4, 1]


def published_views(scale: float, dtype: torch.dtype) -> dict[str, Likelihoods]:
    def rows(seed: int) -> torch.Tensor:
        return torch.nn.functional.normalize(normal(seed, 4, 16), dim=1)

    text = rows(20)
    scores = [scale * (text * rows(seed)).sum(dim=1) for seed in (21, 22)]
    label = torch.tensor(LABELS, dtype=torch.float64)
    importance = 1 / torch.tensor(EXAMPLES_PER_PROMPT, dtype=torch.float64)
    weights = [importance * label, importance * (1 - label)]
    return {
        name: Likelihoods(score.to(dtype), weight=weight.to(dtype))
        for name, score, weight in zip(("chosen", "rejected"), scores, weights, strict=True)
    }


def scored(
    chosen: list[float],
    rejected: list[float],
    weights: tuple[list[float], list[float]] | None = None,
) -> dict[str, Likelihoods]:
    """Views with these scores; `weights` are those of the chosen and of the rejected side."""
    weighed = (None, None) if weights is None else [torch.tensor(w).double() for w in weights]
    return {
        name: Likelihoods(torch.tensor(scores).double().requires_grad_(), weight=weight)
        for name, scores, weight in zip(
            ("chosen", "rejected"), (chosen, rejected), weighed, strict=True
        )
    }


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("scale", PUBLISHED)
def test_value_published_by_the_authors_code(scale, dtype, within):
    loss = BradleyTerry()(published_views(scale, dtype)).loss.mean()
    # A float32 score of 100 is rounded at 1e-5 of itself before any loss sees it.
    assert loss.item() == pytest.approx(PUBLISHED[scale], rel=within, abs=within)


def test_without_weights_it_is_a_logistic_classifier():
    views = scored([2.0, 0.0], [1.0, 3.0])
    expected = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(3.0))]
    assert BradleyTerry()(views).loss.tolist() == pytest.approx(expected)


def test_a_tie_predicted_as_a_tie_costs_nothing():
    views = scored([1.0, 4.0], [1.0, 1.0], ([0.5, 0.5], [0.5, 0.5]))
    output = BradleyTerry()(views)
    # KL of (1/2, 1/2) from (p, 1 - p) is -log(4 p (1 - p)) / 2.
    p = 1 / (1 + math.exp(-3.0))
    assert output.loss.tolist() == pytest.approx([0.0, -math.log(4 * p * (1 - p)) / 2], abs=1e-12)
    assert output.metrics["accuracy"].tolist() == [0.5, 0.5]


def test_gradient_is_predicted_minus_labelled_probability():
    views = scored([0.0, 2.0], [0.0, 0.0], ([0.7, 1.0], [0.3, 0.0]))
    BradleyTerry()(views).loss.sum().backward()
    expected = [0.5 - 0.7, 1 / (1 + math.exp(-2.0)) - 1.0]
    assert views["chosen"].policy.grad.tolist() == pytest.approx(expected)
    assert views["rejected"].policy.grad.tolist() == pytest.approx([-g for g in expected])


def test_the_mean_over_rows_is_the_importance_weighted_mean():
    views = scored([1.0, 2.0], [0.0, 0.0], ([1.0, 0.25], [0.0, 0.0]))
    each = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(-2.0))]
    expected = (1.0 * each[0] + 0.25 * each[1]) / 1.25
    assert BradleyTerry()(views).loss.mean().item() == pytest.approx(expected)


def test_the_mean_over_ranks_is_the_importance_weighted_mean_of_all(monkeypatch):
    chosen, rejected = [1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 0.0, 1.0]
    weights = [1.0, 0.5, 0.125, 0.0], [0.0, 0.0, 0.125, 0.25]
    alone = BradleyTerry()(scored(chosen, rejected, weights)).loss.mean()

    of_side = [torch.tensor([4.0, 0.0, sum(side), 0.0]).double() for side in weights]
    everyone = itertools.cycle(of_side)
    monkeypatch.setattr(world, "total", lambda values: next(everyone))
    ranks = [
        BradleyTerry()(
            scored(chosen[part], rejected[part], (weights[0][part], weights[1][part]))
        ).loss.mean()
        for part in (slice(0, 2), slice(2, 4))
    ]
    assert torch.stack(ranks).mean().item() == pytest.approx(alone.item(), rel=1e-12)


def test_a_batch_without_importance_costs_nothing():
    views = scored([1.0], [0.0], ([0.0], [0.0]))
    loss = BradleyTerry()(views).loss
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert views["chosen"].policy.grad.tolist() == [0.0]


def test_figures_take_the_side_of_the_label():
    views = scored([2.0, 2.0, 0.0], [1.0, 1.0, 0.0], ([1.0, 0.0, 1.0], [0.0, 1.0, 0.0]))
    metrics = BradleyTerry()(views).metrics
    assert metrics["accuracy"].tolist() == [1.0, 0.0, 0.5]
    assert metrics["margin"].tolist() == [1.0, -1.0, 0.0]
    assert not any(value.requires_grad for value in metrics.values())


def test_extreme_scores_stay_finite():
    margin = torch.tensor([-1e4, 1e4, -1e4], requires_grad=True)
    chosen, rejected = torch.tensor([1.0, 1.0, 0.5]), torch.tensor([0.0, 0.0, 0.5])
    loss = bradley_terry_divergence(margin, weight_chosen=chosen, weight_rejected=rejected)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([1e4, 0.0, 5e3], rel=1e-3)
    assert margin.grad.isfinite().all()
