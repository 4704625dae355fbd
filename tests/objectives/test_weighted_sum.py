from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch

from diffalign import config
from diffalign.errors import ConfigError
from diffalign.objectives.anchor import Anchor
from diffalign.objectives.base import AbstractObjective, Likelihoods
from diffalign.objectives.bco import BCO
from diffalign.objectives.bco_pair import PairedBCO
from diffalign.objectives.dpo import DPO
from diffalign.objectives.kto import KTO
from diffalign.objectives.mapo import MaPO
from diffalign.objectives.orpo import ORPO
from diffalign.objectives.sft import SFT
from diffalign.objectives.simpo import SimPO
from diffalign.objectives.tdpo import TDPO
from diffalign.objectives.weighted_sum import Term, WeightedSum
from tests.objectives.fixtures import denoised_gradients
from tests.objectives.responses import numbers, responses, row_of

MDPO = """
objective:
  kind: weighted_sum
  terms:
    - objective: {kind: dpo, beta: 0.1}
    - {objective: {kind: dpo, beta: 0.1}, views: {rejected: chosen@crop}}
    - objective: {kind: anchor, beta: 0.1}
"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The section of a run that is tested."""

    objective: AbstractObjective


def mdpo() -> WeightedSum:
    return WeightedSum(
        terms=(
            Term(objective=DPO(beta=0.1)),
            Term(objective=DPO(beta=0.1), views={"rejected": "chosen@crop"}),
            Term(objective=Anchor(beta=0.1)),
        )
    )


def test_a_method_is_a_few_lines_of_a_config(tmp_path):
    written, saved = tmp_path / "run.yaml", tmp_path / "saved.yaml"
    written.write_text(MDPO)
    run = config.load(Run, written)
    assert run.objective == mdpo()
    assert run.objective.views == {"chosen", "rejected", "chosen@crop"}
    config.save(run, saved)
    assert config.load(Run, saved) == run


def test_before_the_first_step_three_terms_have_no_opinion():
    same = numbers([-2.0, -30.0])
    views = {name: Likelihoods(same, same) for name in mdpo().views}
    assert mdpo()(views).loss.tolist() == pytest.approx([3 * math.log(2)] * 2)


def test_weights_multiply_losses_and_gradients():
    views = responses()
    terms = (Term(objective=DPO(beta=0.5), weight=0.8), Term(objective=SFT(), weight=3.0))
    WeightedSum(terms=terms)(views).loss.mean().backward()
    mixed = views["chosen"].policy.grad.clone()
    alone = []
    for objective in (DPO(beta=0.5), SFT()):
        views = responses()
        objective(views).loss.mean().backward()
        alone.append(views["chosen"].policy.grad)
    assert torch.allclose(mixed, 0.8 * alone[0] + 3.0 * alone[1])


def summed(*terms: tuple[AbstractObjective, float]) -> WeightedSum:
    return WeightedSum(
        terms=tuple(Term(objective=objective, weight=weight) for objective, weight in terms)
    )


def mpo(beta: float, quality: AbstractObjective | None = None) -> WeightedSum:
    """Mixed preference optimisation as InternVL released it: preference, quality, generation."""
    quality = quality or PairedBCO(beta=beta)
    return summed((DPO(beta=beta), 0.8), (quality, 0.2), (SFT(), 1.0))


MIXTURES = {
    # Functions of TRL, executed: each pair alone, all three, slopes in a token of each response.
    "rpo .005": (summed((DPO(beta=0.5), 1.0), (SFT(), 0.005)), [], 0.592932710964, []),
    "rpo 1": (summed((DPO(beta=0.5), 1.0), (SFT(), 1.0)), [], 1.477377155409, []),
    "mpo": (
        mpo(0.5),
        [1.443093743447, 1.486394434666, 1.730894136881],
        1.614571882776,
        [
            *(-0.175635116390, -0.201505557302, -0.176402957914),
            *(0.065344289263, 0.091225527820, 0.068164855591),
        ],
    ),
    "mpo .1": (
        mpo(0.1),
        [1.616239517453, 1.401961605152, 1.887748800786],
        1.696427752241,
        [],
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_published_mixtures(name):
    objective, each, mean, slopes = MIXTURES[name]
    views = responses()
    loss = objective(views).loss.mean()
    loss.backward()
    assert loss.item() == pytest.approx(mean, abs=1e-10)
    found = torch.cat([views[side].policy.grad for side in ("chosen", "rejected")]).tolist()
    assert not slopes or found == pytest.approx(slopes, abs=1e-10)
    # The mean over tokens is one of the batch: what pairs give alone does not average to it.
    alone = [objective(row_of(responses(), row)).loss.item() for row in range(3)]
    assert not each or alone == pytest.approx(each, abs=1e-10)


def test_mpo_with_the_running_threshold_of_its_authors():
    # Their own trainer over two steps, whose running mean is in float32. `bco` is the mean of the
    # two sides where `bco_pair` is their sum, so that it has twice the weight.
    objective = summed((DPO(beta=0.5), 0.8), (BCO(beta=0.5), 0.4), (SFT(), 1.0))
    views = responses()
    assert objective(views).loss.mean().item() == pytest.approx(1.614157516068, abs=1e-8)
    moved = {
        side: dataclasses.replace(views[side], policy=views[side].policy.detach() + change)
        for side, change in (("chosen", 0.2), ("rejected", -0.3))
    }
    second = objective(moved)
    assert second.metrics["bco/delta"].item() == pytest.approx(0.079166669399, abs=1e-8)
    assert second.loss.mean().item() == pytest.approx(1.442967972964, abs=1e-8)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    ("alpha", "expected", "norm"),
    [(1, 0.497527645397, 11.505724263909), (100, 1.486866846873, 11.852045996424)],
)
def test_rpo_of_images_adds_the_chosen_error(alpha, expected, norm, dtype, within):
    # Fine-tuning is minus a log-likelihood, which is half an error: twice the weight.
    objective = summed((DPO(beta=5000.0), 1.0), (SFT(), 2.0 * alpha))
    loss, (whole, *_) = denoised_gradients(objective, dtype)
    assert loss == pytest.approx(expected, abs=within)
    assert whole == pytest.approx(norm, rel=10 * within)


def test_weight_maps_are_views_as_well():
    changed = {"chosen": "chosen:changed", "rejected": "rejected:changed"}
    objective = WeightedSum(terms=(Term(objective=DPO(beta=0.5), views=changed),))
    assert objective.views == {"chosen:changed", "rejected:changed"}
    views = responses()
    renamed = {changed[side]: views[side] for side in changed}
    assert torch.equal(objective(renamed).loss, DPO(beta=0.5)(views).loss)


def test_figures_are_told_apart_by_the_names_of_their_terms():
    metrics = mdpo()(responses()).metrics
    assert {"dpo/loss", "dpo/margin", "dpo_2/margin", "anchor/chosen_reward"} <= set(metrics)
    assert not any(value.requires_grad for value in metrics.values())
    # Margins of the first pair: 1 between responses, .7 between images.
    assert metrics["dpo/margin"][0].item() == pytest.approx(0.1)
    assert metrics["dpo_2/margin"][0].item() == pytest.approx(0.07)


def test_a_term_may_be_named_even_as_another_would_be():
    terms = (Term(objective=DPO(beta=0.1)), Term(objective=DPO(beta=0.2), name="dpo"))
    named = WeightedSum(terms=terms).named
    assert {name: term.objective.beta for name, term in named.items()} == {"dpo_2": 0.1, "dpo": 0.2}


def test_it_needs_what_any_term_needs():
    def needs(*objectives: AbstractObjective) -> tuple[bool, bool]:
        total = WeightedSum(terms=tuple(Term(objective=objective) for objective in objectives))
        return total.needs_reference, total.needs_divergence

    assert needs(SFT()) == (False, False)
    assert needs(SFT(), DPO(beta=1.0)) == (True, False)
    assert needs(SFT(), TDPO(beta=1.0)) == (True, True)


def test_it_reads_of_a_pairs_strength_what_all_terms_read_that_compare_its_sides():
    def reads(*objectives, **views):
        return WeightedSum(
            terms=tuple(Term(objective=one, views=views) for one in objectives)
        ).takes_strength

    assert reads(DPO(beta=1.0), SFT()) == {"preference", "weight", "margin"}
    assert reads(DPO(beta=1.0), SimPO(beta=1.0, gamma=0.0)) == {"preference", "weight"}
    assert reads(DPO(beta=1.0), KTO(beta=1.0)) == set()
    assert reads(SFT()) == set()
    assert reads(DPO(beta=1.0), rejected="chosen@crop") == set()


def test_it_reads_what_has_a_meaning_for_all_terms():
    terms = (Term(objective=DPO(beta=1.0)), Term(objective=MaPO(beta=1.0)))
    assert WeightedSum(terms=terms).reads == {"denoising error"}
    with pytest.raises(ValueError, match="no likelihood has a meaning for all terms: mapo has one"):
        WeightedSum(terms=(Term(objective=MaPO(beta=1.0)), Term(objective=ORPO())))


def test_the_note_is_the_formula():
    crop = {"rejected": "chosen@crop"}
    terms = (
        Term(objective=DPO(beta=0.1)),
        Term(objective=DPO(beta=0.1), views=crop, weight=0.2, name="image"),
        Term(objective=Anchor(beta=0.1)),
    )
    formula = "dpo(chosen, rejected) + 0.2 image(chosen, chosen@crop) + anchor(chosen)"
    assert WeightedSum(terms=terms).note() == formula


def test_every_term_gets_its_own_memory_back():
    def total() -> WeightedSum:
        return WeightedSum(terms=(Term(objective=BCO(beta=1.0)), Term(objective=BCO(beta=3.0))))

    shifted = {
        side: Likelihoods(view.policy + 1.0, view.reference)
        for side, view in responses().items()
        if side in ("chosen", "rejected")
    }
    first, second, fresh = total(), total(), total()
    first(shifted)
    assert set(first.state_dict()) == {"bco/mean", "bco/count", "bco_2/mean", "bco_2/count"}
    second.load_state_dict(first.state_dict())
    losses = [objective(responses()).loss for objective in (first, second, fresh)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("{objective: {kind: dpo, beta: 1}, weight: 0}", "weight must be greater than 0, got 0"),
        (
            "{objective: {kind: dpo, beta: 1}, views: {anchor: chosen}}",
            "views names anchor, and the objective dpo compares chosen, rejected",
        ),
        ("{objective: {kind: dpo, beta: 1}, views: {rejected: a b}}", "'a b' names no view"),
        (
            "{objective: {kind: dpo, beta: 1}, views: {rejected: chosen}}",
            "two views of the objective dpo .* are both the same one",
        ),
        ("{objective: {kind: dpo, beta: 1}, name: a/b}", "name must be letters, digits"),
        ("{objective: {kind: dpa, beta: 1}}", r"terms\[0\]\.objective\.kind.*Did you mean dpo"),
        ("{objective: {kind: dpo, beta: 0}}", r"terms\[0\]\.objective\.beta must be greater"),
    ],
)
def test_a_wrong_term_is_refused_by_its_place(term, message):
    objective = f"objective={{kind: weighted_sum, terms: [{term}]}}"
    with pytest.raises(ConfigError, match=message):
        config.load(Run, None, [objective])


def test_no_terms_and_equal_names_are_refused():
    with pytest.raises(ValueError, match="at least one objective"):
        WeightedSum(terms=())
    term = Term(objective=SFT(), name="x")
    with pytest.raises(ValueError, match="two terms are called x"):
        WeightedSum(terms=(term, term))
