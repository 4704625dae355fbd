"""What every objective must do, whatever it is; a new file in the folder is tested here unasked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from diffalign import components
from diffalign.objectives.base import AbstractObjective, Likelihoods

KINDS = components.kinds(AbstractObjective)
SETTINGS = {"beta": 2.0}
"""Values of the fields that have no default."""
FAVOURED = {"chosen"}
"""Views whose rows should become more likely."""
STEP_ZERO: dict[str, Callable[[Tensor], Tensor]] = {
    # Loss before the first step, where the policy equals its reference and, for objectives without
    # one, both sides are equally likely: a function of those log-likelihoods.
    "mapo": lambda log_likelihood: -2 * log_likelihood + 2.0 * math.log(2),
}
"""Objectives that are not listed start at log 2, as any comparison without an opinion."""


def build(kind: str) -> AbstractObjective:
    cls = components.find(AbstractObjective, kind)
    required = [field.name for field in dataclasses.fields(cls) if _has_no_default(field)]
    return cls(**{name: SETTINGS[name] for name in required})


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def rows(*values: float) -> Tensor:
    return torch.tensor(values, requires_grad=True)


def views_for(
    objective: AbstractObjective, policy: dict[str, Tensor], reference: Sequence[float]
) -> dict[str, Likelihoods]:
    fixed = torch.tensor(reference) if objective.needs_reference else None
    return {view: Likelihoods(policy[view], fixed) for view in objective.views}


@pytest.mark.parametrize("kind", KINDS)
def test_one_finite_loss_per_row_even_for_extreme_likelihoods(kind):
    objective = build(kind)
    extremes = [0.0, -1e-8, -1.0, -1e4]
    pairs = [(one, other) for one in extremes for other in extremes]
    policy = {view: rows(*(pair[view in FAVOURED] for pair in pairs)) for view in objective.views}
    output = objective(views_for(objective, policy, [-1.0] * len(pairs)))
    output.loss.sum().backward()
    assert output.loss.shape == (len(pairs),)
    assert output.loss.isfinite().all()
    for view, values in policy.items():
        assert values.grad.isfinite().all(), view
    for name, values in output.metrics.items():
        assert values.isfinite().all() and not values.requires_grad, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_more_likely_favoured_side_lowers_the_loss(kind):
    objective = build(kind)
    assert objective.views & FAVOURED
    policy = {view: rows(-0.01, -0.02, -0.03) for view in objective.views}
    objective(views_for(objective, policy, [-0.01, -0.03, -0.02])).loss.sum().backward()
    for view in objective.views & FAVOURED:
        assert (policy[view].grad < 0).all(), view


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_nothing_has_an_opinion(kind):
    objective = build(kind)
    start = [-0.001, -0.2, -3.0]
    policy = {view: rows(*start) for view in objective.views}
    loss = objective(views_for(objective, policy, start)).loss
    expected = STEP_ZERO.get(kind, lambda values: torch.full_like(values, math.log(2)))
    assert loss.tolist() == pytest.approx(expected(torch.tensor(start)).tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_see_its_neighbours(kind):
    objective = build(kind)
    together = {view: rows(-0.01, -0.5) for view in objective.views}
    alone = {view: values[:1] for view, values in together.items()}
    both = objective(views_for(objective, together, [-0.02, -0.4])).loss
    one = objective(views_for(objective, alone, [-0.02])).loss
    assert torch.equal(both[:1], one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_note_is_one_line(kind):
    assert "\n" not in build(kind).note()
