"""What every objective must do, whatever it is; a new file in the folder is tested here unasked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from diffalign import components
from diffalign.objectives.anchor import Anchor
from diffalign.objectives.base import (
    AbstractObjective,
    Likelihoods,
    LossOutput,
    StepTotals,
    TokenLikelihoods,
)
from diffalign.objectives.dpo import DPO
from diffalign.objectives.weighted_sum import Term


def name_of(kind: str, settings: dict[str, object]) -> str:
    return " ".join([kind, *map(str, settings.values())])


KINDS = components.kinds(AbstractObjective)
SETTINGS = {
    "beta": 2.0,
    "beta_rejected": 2.0,
    "alpha": 2.0,
    "ranked": ("chosen", "chosen@crop", "chosen@diffuse"),
    "gamma": 0.5,
    "divergence": "forward_kl",
    "objective": DPO(beta=2.0),
    "terms": (
        Term(objective=DPO(beta=2.0)),
        Term(objective=DPO(beta=2.0), views={"rejected": "chosen@crop"}, weight=0.5),
        Term(objective=Anchor(beta=2.0)),
    ),
}
"""Values of the fields that have no default."""
EMBEDDING = torch.ones(16, 2)
"""All rows are about the same: whatever their order, they are compared alike."""
MORE = {"dspo": {"share": 0.5}}
"""Settings of kinds whose default does not go with those."""
FORMS = [
    ("anchor", {"direction": "down"}),
    ("aot", {"form": "unpaired"}),
    ("apo", {"form": "down"}),
    ("chip_released", {"token_beta": 0.0}),
    ("diffusion_rpo", {"weight": "inside"}),
    ("discopop", {"temperature": 1.0}),
    ("f_dpo", {"divergence": "js"}),
    ("grpo", {"form": "grpo"}),
    ("grpo", {"form": "dapo", "beta": 2.0}),
    ("grpo", {"form": "dr_grpo", "max_length": 2}),
    ("grpo", {"form": "luspo", "importance": "sequence"}),
    ("grpo", {"form": "sapo"}),
    ("f_dpo", {"divergence": "alpha", "alpha": 0.5}),
    ("f_dpo", {"divergence": "alpha", "alpha": 2.0}),
    ("ipo", {"in_rewards": True}),
    ("kto", {"baseline": "mismatched"}),
    ("kto", {"baseline": "classes"}),
    ("kto", {"utility": "loss_averse"}),
    ("kto", {"utility": "risk_seeking_1"}),
    ("kto", {"utility": "risk_seeking_2"}),
    ("kto", {"utility": "risk_seeking_3"}),
    ("advantage_regression", {"divided_by_beta": True}),
    ("margin_regression", {"divided_by_beta": True}),
    ("sft", {"per": "response"}),
    ("sppo", {"sides": "mean"}),
    ("tdpo", {"version": 1}),
    ("v_dpo", {"blind": "reference"}),
]
"""Further forms of some kinds. Two of `grpo`, whose ratio has no gradient, are not those that
finite differences see: its own test has theirs."""
OBJECTIVES = [(kind, {}) for kind in KINDS] + FORMS
DIRECTIONS = {"chosen": -1, "gold": -1, "rejected": 1, "sampled": -1}
"""Sign of the loss's slope in the likelihood of a view; of a sampled one with an advantage."""
UNDIRECTED = {"apo down": {"chosen"}, "dspo": {"rejected"}, "seppo": {"sampled"}}
"""Views that a form pushes up or down, as the other side lies."""
RISES_AT_START = {"discopop"}
"""Forms whose loss has the wrong slope near a margin of 0, as published; their tests say where."""
SEES_NEIGHBOURS = {"aot unpaired", "bco", "diffusion_rpo", "diffusion_rpo inside"} | {
    name_of(*form) for form in OBJECTIVES if form[0] == "kto"
}
"""Those that compare with other rows: a mean over the batch, or what has the same rank there."""
LOG_2 = math.log(2)
STEP_ZERO: dict[str, Callable[[Tensor], Tensor]] = {
    # Loss before the first step, where the policy equals its reference and, for objectives without
    # one, both sides are equally likely: a function of those log-likelihoods.
    "advantage_regression": lambda x: torch.full_like(x, 1.0),
    "advantage_regression True": lambda x: torch.full_like(x, 1 / 4),
    "apo": lambda x: torch.full_like(x, 1.0),
    "apo down": lambda x: torch.full_like(x, 1.0),
    "asft": lambda x: -x + 0.1 * (-x - torch.log(1 - x.double().exp()).float()),
    "bco_pair": lambda x: torch.full_like(x, 2 * LOG_2),
    "cpo": lambda x: LOG_2 - x,
    "discopop": lambda x: torch.full_like(x, (LOG_2 + 1) / 2),
    "discopop 1.0": lambda x: torch.full_like(x, (LOG_2 + 1) / 2),
    "dspo": lambda x: -2 * x,
    "exo": lambda x: torch.full_like(x, -LOG_2 - (math.log(0.999) + math.log(0.001)) / 2),
    "grpo": lambda x: torch.full_like(x, -1.0),
    "grpo grpo": lambda x: torch.full_like(x, -1.0),
    "grpo dapo 2.0": lambda x: torch.full_like(x, -1.0),
    "grpo dr_grpo 2": lambda x: torch.full_like(x, -0.5),
    "grpo luspo sequence": lambda x: torch.full_like(x, -1.0),
    "grpo sapo": lambda x: torch.full_like(x, -2.0),
    "hinge": lambda x: torch.full_like(x, 1.0),
    "ipo": lambda x: torch.full_like(x, 1 / 16),  # (1 / (2 beta))^2
    "ipo True": lambda x: torch.full_like(x, 1 / 4),
    "kto": lambda x: torch.full_like(x, 0.5),
    "kto mismatched": lambda x: torch.full_like(x, 0.5),
    "kto classes": lambda x: torch.full_like(x, 0.5),
    "kto loss_averse": lambda x: torch.full_like(x, 1 + LOG_2),
    "kto risk_seeking_1": lambda x: torch.full_like(x, 1.0),
    "kto risk_seeking_2": lambda x: torch.full_like(x, 2.0),
    "kto risk_seeking_3": lambda x: torch.full_like(x, 1 - LOG_2),
    "margin_regression": lambda x: torch.full_like(x, 1 / 4),
    "margin_regression True": lambda x: torch.full_like(x, 1 / 16),
    "mapo": lambda x: -2 * x + 2.0 * LOG_2,
    "nca": lambda x: torch.full_like(x, 2 * LOG_2),
    "orpo": lambda x: -x + 0.1 * LOG_2,
    "plackett_luce": lambda x: torch.full_like(x, math.log(6)),
    "rloo": lambda x: torch.full_like(x, -1.0),
    "sft": lambda x: -x,
    "sft response": lambda x: -x,
    "simpo": lambda x: torch.full_like(x, math.log1p(math.exp(0.5))),
    "sppo": lambda x: torch.full_like(x, 2 / 16),
    "sppo mean": lambda x: torch.full_like(x, 1 / 16),
    "tpo": lambda x: LOG_2 - x,
    "weighted_sum": lambda x: torch.full_like(x, 2.5 * LOG_2),
}
"""Objectives that are not listed start at log 2, as any comparison without an opinion."""


every_objective = pytest.mark.parametrize(
    ("kind", "settings"), OBJECTIVES, ids=[name_of(*form) for form in OBJECTIVES]
)


def required_of(kind: str) -> list[str]:
    """Names of the settings that have no default."""
    fields = dataclasses.fields(components.find(AbstractObjective, kind))
    return [field.name for field in fields if _has_no_default(field)]


def build(kind: str, settings: dict[str, object]) -> AbstractObjective:
    settings = {**MORE.get(kind, {}), **settings}
    required = {name: SETTINGS[name] for name in required_of(kind)}
    return components.find(AbstractObjective, kind)(**{**required, **settings})


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def rows(*values: float) -> Tensor:
    return torch.tensor(values, requires_grad=True)


def evaluate(
    objective: AbstractObjective, policy: dict[str, Tensor], reference: Sequence[float]
) -> LossOutput:
    fixed = torch.tensor(reference) if objective.needs_reference else None
    divergence = torch.zeros(len(reference)) if objective.needs_divergence else None
    known = known_of(objective, len(reference))
    return objective(
        {
            view: Likelihoods(
                policy[view],
                fixed,
                divergence=divergence,
                tokens=tokens_of(policy[view], torch.tensor(reference)),
                **known,
            )
            for view in objective.views
        }
    )


def tokens_of(policy: Tensor, before: Tensor) -> TokenLikelihoods:
    """Rows of one token each, which was as likely when it was sampled as under the reference."""
    return TokenLikelihoods(
        policy=policy[:, None],
        weights=torch.ones_like(policy)[:, None].detach(),
        old=before[:, None],
        reference=before[:, None],
    )


def target_of(objective: AbstractObjective, n: int) -> Tensor | None:
    """Of the reward margin of n pairs, for those that regress it."""
    return torch.full((n,), 0.5) if "target" in objective.needs_strength else None


def known_of(objective: AbstractObjective, n: int) -> dict[str, Tensor | None]:
    """What an objective needs to be told of n rows besides their likelihoods."""
    given = {
        "distance": torch.zeros(n),
        "typicality": torch.zeros(n),
        "embedding": EMBEDDING[:n],
        "preference": torch.full((n,), 0.8),
        "advantage": torch.ones(n),
    }
    needed = objective.needs_measured | objective.needs_strength
    known = {name: rows for name, rows in given.items() if name in needed}
    if "tokens" in needed:
        known["length"] = torch.ones(n)
    return {**known, "target": target_of(objective, n)}


@every_objective
def test_one_finite_loss_per_row_even_for_extreme_likelihoods(kind, settings):
    objective = build(kind, settings)
    extremes = [0.0, -1e-8, -1.0, -1e4]
    pairs = [(one, other) for one in extremes for other in extremes]
    policy = {view: rows(*(pair[view == "chosen"] for pair in pairs)) for view in objective.views}
    output = evaluate(objective, policy, [-1.0] * len(pairs))
    output.loss.sum().backward()
    assert output.loss.shape == (len(pairs),)
    assert output.loss.isfinite().all()
    for view, values in policy.items():
        assert values.grad is None or values.grad.isfinite().all(), view
    for name, values in output.metrics.items():
        assert values.isfinite().all() and not values.requires_grad, name


@every_objective
def test_the_loss_falls_as_the_right_side_becomes_more_likely(kind, settings):
    objective = build(kind, settings)
    directed = set(DIRECTIONS) & objective.views - UNDIRECTED.get(name_of(kind, settings), set())
    assert directed
    policy = {view: rows(-0.01, -0.02, -0.03) for view in objective.views}
    evaluate(objective, policy, [-0.01, -0.03, -0.02]).loss.sum().backward()
    wrong = -1 if name_of(kind, settings) in RISES_AT_START else 1
    for view in directed:
        assert (policy[view].grad * DIRECTIONS[view] * wrong > 0).all(), view


@every_objective
def test_before_the_first_step_nothing_has_an_opinion(kind, settings):
    objective = build(kind, settings)
    start = [-0.001, -0.2, -3.0]
    policy = {view: rows(*start) for view in objective.views}
    loss = evaluate(objective, policy, start).loss
    no_opinion = STEP_ZERO.get(name_of(kind, settings), lambda x: torch.full_like(x, LOG_2))
    assert loss.tolist() == pytest.approx(no_opinion(torch.tensor(start)).tolist())


@every_objective
def test_a_row_does_not_see_its_neighbours(kind, settings):
    objective = build(kind, settings)
    together = {
        view: rows(-0.9 + 0.4 * i, -0.5 + 1.0 * i) for i, view in enumerate(sorted(objective.views))
    }
    alone = {view: values[:1] for view, values in together.items()}
    both = evaluate(build(kind, settings), together, [-1.2, -0.4]).loss
    one = evaluate(objective, alone, [-1.2]).loss
    assert torch.equal(both[:1], one) == (name_of(kind, settings) not in SEES_NEIGHBOURS)


@every_objective
def test_the_order_of_rows_does_not_matter(kind, settings):
    values = {
        view: torch.tensor([-0.1, -0.7, -0.3]) - 0.05 * i
        for i, view in enumerate(sorted(build(kind, settings).views))
    }
    reference, order = torch.tensor([-0.2, -0.4, -0.5]), [2, 0, 1]
    loss = evaluate(build(kind, settings), values, reference.tolist()).loss
    permuted = {view: rows[order] for view, rows in values.items()}
    again = evaluate(build(kind, settings), permuted, reference[order].tolist()).loss
    assert again.tolist() == pytest.approx(loss[order].tolist())


def inputs_of(objective: AbstractObjective) -> dict[str, Tensor]:
    """Everything that a loss could send a gradient to: likelihoods of views, divergences and
    distances."""
    views = names = sorted(objective.views)
    if objective.needs_divergence:
        names = names + [f"{view}.divergence" for view in views]
    if "distance" in objective.needs_measured:
        names = names + [f"{view}.distance" for view in views]
    return {
        name: torch.tensor([-0.61, -0.2]).double().add(0.07 * i).requires_grad_()
        for i, name in enumerate(names)
    }


def loss_of(objective: AbstractObjective, inputs: dict[str, Tensor]) -> Tensor:
    """Of two rows within a step whose sums do not move with them, as in training."""
    reference = torch.tensor([-0.6, -0.4]).double()
    parts = [Likelihoods(torch.tensor([-0.3, -0.4]).double(), reference, torch.ones(2))]
    step = StepTotals.of(parts, every_row=True)
    views = {
        view: Likelihoods(
            inputs[view],
            reference,
            divergence=inputs.get(f"{view}.divergence"),
            tokens=tokens_of(inputs[view], reference),
            whole_step=step,
            **{**known_of(objective, 2), "distance": inputs.get(f"{view}.distance")},
        )
        for view in objective.views
    }
    return objective(views).loss


@every_objective
def test_gradients_are_those_of_the_loss_wherever_it_holds_nothing_fixed(kind, settings):
    """Against finite differences, in all inputs that are not declared as fixed."""
    inputs = inputs_of(build(kind, settings))
    fixed = build(kind, settings).holds_fixed
    assert fixed <= inputs.keys()
    moved = [name for name in inputs if name not in fixed]

    def loss(*values: Tensor) -> Tensor:
        known = {name: value.detach() for name, value in inputs.items()}
        return loss_of(build(kind, settings), {**known, **dict(zip(moved, values, strict=True))})

    assert torch.autograd.gradcheck(loss, [inputs[name] for name in moved])


@every_objective
def test_what_is_read_without_a_gradient_is_declared_as_fixed(kind, settings):
    inputs = inputs_of(build(kind, settings))
    loss = loss_of(build(kind, settings), inputs)
    loss.sum().backward()

    def is_read(name: str) -> bool:
        moved = loss_of(build(kind, settings), {**inputs, name: inputs[name] - 0.05})
        return not torch.equal(moved, loss)

    still = {name for name, value in inputs.items() if value.grad is None or not value.grad.any()}
    assert {name for name in still if is_read(name)} == build(kind, settings).holds_fixed


@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if "beta" in required_of(kind)],
)
def test_what_nothing_is_learnt_at_is_refused(kind):
    with pytest.raises(ValueError, match=r"beta must be greater than 0, got 0\.0"):
        build(kind, {"beta": 0.0})


@every_objective
def test_a_note_is_one_line(kind, settings):
    assert "\n" not in build(kind, settings).note()
