"""How sure a pair is, in every objective that reads it: a new file in the folder is tested here."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from diffalign.objectives.base import AbstractObjective, Likelihoods, LossOutput, StepTotals
from diffalign.objectives.dpo import DPO
from diffalign.objectives.hinge import Hinge
from diffalign.objectives.pair import AbstractPairObjective, exchanged, exchanged_name
from diffalign.objectives.sft import SFT
from diffalign.objectives.weighted_sum import Term, WeightedSum
from tests.objectives.fixtures import denoised_pairs, denoised_views
from tests.objectives.responses import numbers
from tests.objectives.test_family import OBJECTIVES, build, name_of

SOFT = [
    form
    for form in OBJECTIVES
    if "preference" in build(*form).takes_strength - build(*form).needs_strength
]
COMPARING = [form for form in OBJECTIVES if "margin" in build(*form).takes_strength]
CERTAIN_ALONE = {
    # one side alone, or each side for itself against a memory or a mean over the batch
    *("anchor", "anchor down", "bco", "npo", "sft", "sft response"),
    *(name_of(*form) for form in OBJECTIVES if form[0] == "kto"),
    *(name_of(*form) for form in OBJECTIVES if form[0] in ("grpo", "rloo")),
    *("advantage_regression", "advantage_regression True"),  # a response is no pair
    *("aot", "aot unpaired"),  # sorts the sides of all pairs
    *("diffusion_rpo", "diffusion_rpo inside"),  # compares sides of other pairs
    "d2o",  # neither of its sides is better by a label
    "plackett_luce",  # it compares images
    "seppo",  # its other side is sampled, and no label compares the two
    "chip_released",  # it has no view of the rejected response next to spoilt images
    "chip_released 0.0",
    "margin_regression",  # its target says both which side is better and by how much
    "margin_regression True",
}
"""Those that refuse a preference, each for its reason."""
HAVE_THEIR_OWN = {"smpo"}
"""Those that read it, and not as the mean over both orders."""
KEPT_BY_SCORES = {"bradley_terry"}
"""Whose likelihood turns preferences into weights of either side."""


def of_forms(forms):
    return pytest.mark.parametrize(
        ("kind", "settings"), forms, ids=[name_of(*form) for form in forms]
    )


one_order = of_forms(
    [form for form in SOFT if name_of(*form) not in {*KEPT_BY_SCORES, "weighted_sum"}]
)
"""Without the sum: a term of the chosen response next to other images has no other order."""
soft = of_forms([form for form in SOFT if name_of(*form) not in KEPT_BY_SCORES])


def random_views(objective: AbstractObjective, n: int = 5, **strength: Tensor):
    """Views of n pairs, which no two are alike of; every leaf takes gradient."""
    generator = torch.Generator().manual_seed(7)

    def some(low: float = -3.0, high: float = -0.01) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    return {
        view: Likelihoods(
            some().requires_grad_(),
            some() if objective.needs_reference else None,
            length=torch.arange(2.0, 2.0 + n).double() + i,
            divergence=some(0.1, 1.0).requires_grad_() if objective.needs_divergence else None,
            distance=some(0.1, 1.0).requires_grad_()
            if "distance" in objective.needs_measured
            else None,
            typicality=some(-1.0, 1.0) if "typicality" in objective.needs_measured else None,
            **strength,
        )
        for i, view in enumerate(sorted(objective.views))
    }


def with_strength(views, **strength: Tensor):
    return {name: dataclasses.replace(view, **strength) for name, view in views.items()}


def leaves_of(views) -> dict[str, Tensor]:
    found = {name: view.policy for name, view in views.items()}
    for name, view in views.items():
        further = {"divergence": view.divergence, "distance": view.distance}
        found |= {f"{name}.{part}": leaf for part, leaf in further.items() if leaf is not None}
    return found


def gradients(objective: AbstractObjective, views, leaves) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and its gradients in some leaves of its views by their name."""
    loss = objective(views).loss
    found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
    return loss.detach(), {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def within_a_step(views):
    """The views with the sums of the step, which does not change with their order."""
    return {
        name: dataclasses.replace(view, whole_step=StepTotals.of([view]))
        for name, view in views.items()
    }


P = torch.tensor([0.9, 0.5, 0.25, 0.0, 0.6]).double()
MARGIN = torch.tensor([0.4, -0.4, 1.0, 0.0, 2.0]).double()


def test_every_objective_either_reads_a_preference_or_is_known_to_refuse_it():
    refusing = {name_of(*form) for form in OBJECTIVES if form not in SOFT}
    assert refusing == CERTAIN_ALONE | HAVE_THEIR_OWN


def test_all_pair_objectives_read_it():
    pairs = [form for form in OBJECTIVES if isinstance(build(*form), AbstractPairObjective)]
    assert len(pairs) > 15
    for form in pairs:
        objective = build(*form)
        assert objective.takes_strength >= {"weight", *objective.needs_strength}, form
        assert ("preference" in objective.takes_strength) != ("target" in objective.takes_strength)


@soft
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_certain_preference_is_the_loss_without_one_to_the_last_bit(kind, settings, dtype):
    objective = build(kind, settings)
    views = {
        name: dataclasses.replace(
            view,
            policy=view.policy.detach().to(dtype).requires_grad_(),
            reference=None if view.reference is None else view.reference.to(dtype),
        )
        for name, view in random_views(objective, 64).items()
    }
    loss, plain = gradients(objective, views, leaves_of(views))
    certain = with_strength(views, preference=torch.ones(64))
    again, same = gradients(objective, certain, leaves_of(views))
    assert torch.equal(loss, again)
    assert all(torch.equal(plain[name], same[name]) for name in plain)


@soft
def test_certain_pairs_are_as_ever_next_to_others_that_are_not(kind, settings):
    objective = build(kind, settings)
    views = within_a_step(random_views(objective))
    preference = torch.tensor([1.0, 0.75, 1.0, 0.5, 1.0]).double()
    sure = preference == 1
    loss, plain = gradients(objective, views, leaves_of(views))
    mixed = with_strength(views, preference=preference)
    softened, found = gradients(objective, mixed, leaves_of(views))
    assert torch.equal(loss[sure], softened[sure])
    assert (loss != softened)[~sure].any()
    assert all(torch.equal(plain[name][sure], found[name][sure]) for name in plain)
    assert (plain["chosen"] != found["chosen"])[~sure].any()


@soft
def test_what_overflows_the_other_way_round_leaves_certain_pairs_alone(kind, settings):
    objective = build(kind, settings)
    views = random_views(objective)
    for name in ("chosen", "rejected"):  # at least one order of one loss is infinite for one row
        views[name].policy.data[:2] = -1e300 if name == "rejected" else -1e-3
    certain = with_strength(views, preference=torch.ones(5).double())
    loss, plain = gradients(objective, views, leaves_of(views))
    again, found = gradients(objective, certain, leaves_of(views))
    assert torch.equal(loss.nan_to_num(), again.nan_to_num())
    assert all(torch.equal(plain[n].nan_to_num(), found[n].nan_to_num()) for n in plain)


def test_the_gradient_of_a_certain_pair_is_not_that_of_an_infinite_loss():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Cliff(AbstractPairObjective):
        def pair_loss(self, chosen, rejected):
            return LossOutput((chosen.policy - rejected.policy).log())

    chosen, rejected = numbers([2.0]).requires_grad_(), numbers([2.0 - 1e-9])
    views = {
        side: Likelihoods(rows, numbers([0.0]), preference=numbers([1.0]))
        for side, rows in (("chosen", chosen), ("rejected", rejected))
    }
    Cliff(beta=1.0)(views).loss.sum().backward()
    assert chosen.grad.item() == pytest.approx(1e9, rel=1e-6)


@one_order
def test_the_loss_is_the_mean_over_both_orders(kind, settings):
    """Value and gradient, from two evaluations of the objective as it is without preferences."""
    objective = build(kind, settings)
    views = within_a_step(random_views(objective))
    leaves = leaves_of(views)
    loss, found = gradients(objective, with_strength(views, preference=P), leaves)
    one, first = gradients(objective, views, leaves)
    other, second = gradients(objective, exchanged(views), leaves)
    assert torch.allclose(loss, P * one + (1 - P) * other, rtol=0, atol=1e-12)
    for name, gradient in found.items():
        expected = P * first[name] + (1 - P) * second[name]
        assert torch.allclose(gradient, expected, rtol=0, atol=1e-12), name


@one_order
def test_the_complement_with_exchanged_sides_is_the_same_loss(kind, settings):
    objective = build(kind, settings)
    views = within_a_step(random_views(objective))
    ours = objective(with_strength(views, preference=P)).loss
    theirs = objective(with_strength(exchanged(views), preference=1 - P)).loss
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


@one_order
def test_an_undecided_pair_at_a_margin_of_zero_moves_no_margin(kind, settings):
    """Both sides may be pushed, but alike: their difference gets no gradient."""
    objective = build(kind, settings)
    views = random_views(objective)
    for name in views:
        if name.startswith("rejected"):
            twin = views[exchanged_name(name)]
            leaves = {
                "policy": twin.policy,
                "divergence": twin.divergence,
                "distance": twin.distance,
            }
            views[name] = dataclasses.replace(
                twin,
                **{
                    key: None if value is None else value.detach().clone().requires_grad_()
                    for key, value in leaves.items()
                },
            )
    undecided = with_strength(views, preference=torch.full((5,), 0.5).double())
    _, found = gradients(objective, undecided, leaves_of(views))
    assert torch.allclose(found["chosen"], found["rejected"], rtol=0, atol=1e-14)


@one_order
def test_a_weight_multiplies_the_loss_of_its_pair(kind, settings):
    objective = build(kind, settings)
    views, weight = random_views(objective), torch.tensor([2.0, 0.0, 1.0, 0.5, 3.0]).double()
    plain = objective(views).loss
    weighted = objective(with_strength(views, weight=weight)).loss
    assert torch.allclose(weighted, weight * plain, rtol=0, atol=1e-14)


@of_forms([form for form in COMPARING if form[0] not in ("weighted_sum", "wpo")])
def test_a_margin_is_subtracted_from_the_reward_of_the_chosen_side(kind, settings):
    objective = build(kind, settings)
    views = random_views(objective)
    lower = views["chosen"].policy - MARGIN / objective.beta
    shifted = {**views, "chosen": dataclasses.replace(views["chosen"], policy=lower)}
    output = objective(with_strength(views, margin=MARGIN))
    assert torch.allclose(output.loss, objective(shifted).loss, rtol=0, atol=1e-12)
    assert torch.equal(output.metrics["margin"], objective(views).metrics["margin"])


def test_accuracy_of_undecided_pairs_is_one_half_and_of_those_turned_round_is_turned():
    views = random_views(DPO(beta=1.0), 3)
    plain = DPO(beta=1.0)(views).metrics["accuracy"]
    preference = torch.tensor([0.5, 0.25, 0.75]).double()
    metrics = DPO(beta=1.0)(with_strength(views, preference=preference)).metrics
    assert metrics["accuracy"].tolist() == [0.5, 1 - plain[1].item(), plain[2].item()]
    assert metrics["preference"].tolist() == [0.5, 0.25, 0.75]


class TestPublishedFixtures:
    """Values and gradients of the reference of the field's formulas, in float64."""

    @pytest.mark.parametrize(
        ("p", "expected"),
        [
            (1.0, 0.471696842660),
            (0.9, 0.596696842660),
            (0.5, 1.096696842660),
            (0.25, 1.409196842660),
        ],
    )
    def test_soft_cross_entropy_on_margins(self, p, expected):
        margins = numbers([1.5, -0.5, 0.0, 4.0])
        zeros = torch.zeros_like(margins)
        given = torch.full_like(margins, p)
        views = {
            "chosen": Likelihoods(margins, zeros, preference=given),
            "rejected": Likelihoods(zeros, zeros, preference=given),
        }
        assert DPO(beta=1.0)(views).loss.mean().item() == pytest.approx(expected, abs=1e-11)

    @pytest.mark.parametrize(
        ("p", "loss", "norm", "first_chosen", "first_rejected"),
        [
            (1.0, 0.487534320130, 11.502399121836, 0.019106833015, 0.025224644479),
            (0.9, 0.666863147766, 9.973998475256, -0.086644818266, -0.114387598146),
            (0.5, 1.384178458310, 9.887759877467, -0.509651423386, -0.672836568648),
            (0.25, 1.832500527400, 14.212154240669, -0.774030551587, -1.021867175212),
            ((1.0, 0.9, 0.25), 0.302814286947, 0.405061145730, 0.019106833015, 0.025224644479),
        ],
    )
    def test_soft_cross_entropy_of_diffusion_dpo(self, p, loss, norm, first_chosen, first_rejected):
        policy, reference, target = denoised_pairs(torch.float64)
        policy.requires_grad_()
        preference = numbers(list(p) if isinstance(p, tuple) else [p] * 3)
        views = denoised_views(policy, reference, target, ("chosen", "rejected"))
        output = DPO(beta=5000.0)(with_strength(views, preference=preference)).loss.mean()
        output.backward()
        assert output.item() == pytest.approx(loss, abs=1e-10)
        assert policy.grad.norm().item() == pytest.approx(norm, abs=1e-10)
        assert policy.grad[0, 0, 0, 0].item() == pytest.approx(first_chosen, abs=1e-10)
        assert policy.grad[3, 0, 0, 0].item() == pytest.approx(first_rejected, abs=1e-10)

    @pytest.mark.parametrize(
        ("first", "rest", "beta", "expected", "gradient"),
        [
            (0.5, (0.5,), 0.1, 0.603562488147, [-0.037642419454, -0.025169377920, -0.026434450009]),
            (0.9, (0.1,), 0.1, 0.662257070691, None),
            (1.0, (0.0,), 0.1, 0.671792961357, None),
        ],
    )
    def test_margins_of_several_rewards(self, first, rest, beta, expected, gradient):
        """MODPO: s = (beta d - w_rest gap) / w_first, as beta / w_first and a margin."""
        views = modpo(margin=(rest[0] / first) * numbers([0.4, -0.4, -0.4]))
        loss = DPO(beta=beta / first)(views).loss.mean()
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-10)
        if gradient is not None:
            found = views["chosen"].policy.grad.tolist()
            assert found == pytest.approx(gradient, abs=1e-10)

    def test_margins_of_two_further_rewards_under_a_hinge(self):
        gaps = 0.3 * numbers([0.4, -0.4, -0.4]) + 0.2 * numbers([0.8, -0.5, 0.1])
        loss = Hinge(beta=0.1 / 0.5)(modpo(margin=gaps / 0.5)).loss.mean()
        assert loss.item() == pytest.approx(0.886666666667, abs=1e-10)

    def test_margins_of_diffusion_dpo(self):
        policy, reference, target = denoised_pairs(torch.float64)
        policy.requires_grad_()
        views = denoised_views(policy, reference, target, ("chosen", "rejected"))
        # kappa 2500 is beta 5000 of half an error; weights (.5, .5) double it
        margin = numbers([0.4, -0.4, 1.0])
        output = DPO(beta=10000.0)(with_strength(views, margin=margin))
        loss = output.loss.mean()
        loss.backward()
        assert loss.item() == pytest.approx(1.059774827088, abs=1e-10)
        assert policy.grad.norm().item() == pytest.approx(29.478501238871, abs=1e-10)
        assert policy.grad[0, 0, 0, 0].item() == pytest.approx(0.001067715653, abs=1e-10)
        assert policy.grad[3, 0, 0, 0].item() == pytest.approx(0.001409587226, abs=1e-10)

    def test_the_minimum_is_where_the_model_is_as_sure_as_the_label(self):
        p, at = numbers([0.75]), numbers([math.log(3)]).requires_grad_()
        views = {
            "chosen": Likelihoods(at, numbers([0.0]), preference=p),
            "rejected": Likelihoods(numbers([0.0]), numbers([0.0]), preference=p),
        }
        loss = DPO(beta=1.0)(views).loss
        loss.sum().backward()
        entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
        assert loss.item() == pytest.approx(entropy, abs=1e-15)
        assert at.grad.item() == pytest.approx(0, abs=1e-16)


def modpo(margin: Tensor) -> dict[str, Likelihoods]:
    chosen = numbers([-10.0, -12.0, -9.0]).requires_grad_()
    return {
        "chosen": Likelihoods(chosen, numbers([-10.5, -12.0, -9.2]), margin=margin),
        "rejected": Likelihoods(
            numbers([-11.0, -11.5, -9.5]), numbers([-10.8, -11.0, -9.6]), margin=margin
        ),
    }


class TestTermsOfASum:
    def test_a_term_of_one_side_is_the_mean_over_both_where_the_other_is_there(self):
        soft = Term(objective=DPO(beta=1.0)), Term(objective=SFT(per="response"), weight=0.5)
        views = within_a_step(random_views(DPO(beta=1.0)))
        loss = WeightedSum(terms=soft)(with_strength(views, preference=P)).loss
        dpo = DPO(beta=1.0)(with_strength(views, preference=P)).loss
        sft = -P * views["chosen"].average - (1 - P) * views["rejected"].average
        assert torch.allclose(loss, dpo + 0.5 * sft, rtol=0, atol=1e-12)

    def test_a_response_next_to_other_images_is_no_question_of_who_won(self):
        objective = build("weighted_sum", {})
        views = within_a_step(random_views(objective))
        softened = objective(with_strength(views, preference=P)).metrics
        plain = objective(views).metrics
        assert torch.equal(softened["dpo_2/loss"], plain["dpo_2/loss"])
        assert not torch.equal(softened["dpo/loss"], plain["dpo/loss"])

    def test_weights_multiply_every_term(self):
        objective = build("weighted_sum", {})
        views, weight = within_a_step(random_views(objective)), 1 + MARGIN
        loss = objective(with_strength(views, weight=weight)).loss
        assert torch.allclose(loss, weight * objective(views).loss, rtol=0, atol=1e-12)

    def test_sides_that_are_exchanged_have_the_other_probability_and_margin(self):
        turned = {"chosen": "rejected", "rejected": "chosen"}
        views = with_strength(random_views(DPO(beta=1.0)), preference=P, margin=MARGIN)
        found = WeightedSum(terms=(Term(objective=DPO(beta=1.0), views=turned),))(views).loss
        expected = DPO(beta=1.0)(
            with_strength(exchanged(views), preference=1 - P, margin=-MARGIN)
        ).loss
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
