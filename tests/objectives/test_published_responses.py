"""Values of TRL's and of the authors' own functions on the three pairs of `responses`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffalign import config
from diffalign.objectives.anchor import Anchor
from diffalign.objectives.apo import APO
from diffalign.objectives.asft import align_loss
from diffalign.objectives.base import Likelihoods
from diffalign.objectives.bco import BCO
from diffalign.objectives.bco_pair import PairedBCO
from diffalign.objectives.cdpo import ConservativeDPO
from diffalign.objectives.chip_released import ReleasedCHiP
from diffalign.objectives.cpo import CPO
from diffalign.objectives.dpo import DPO
from diffalign.objectives.exo import EXO
from diffalign.objectives.f_dpo import DivergenceDPO
from diffalign.objectives.hinge import Hinge
from diffalign.objectives.ipo import IPO
from diffalign.objectives.kto import KTO
from diffalign.objectives.nca import NCA
from diffalign.objectives.npo import NPO
from diffalign.objectives.orpo import ORPO, log_odds
from diffalign.objectives.robust import RobustDPO
from diffalign.objectives.sft import SFT
from diffalign.objectives.simpo import SimPO
from diffalign.objectives.sppo import SPPO, sppo_loss
from diffalign.objectives.tdpo import TDPO
from diffalign.objectives.tpo import TriplePO
from diffalign.objectives.v_dpo import mixed_score
from diffalign.objectives.weighted_sum import Term, WeightedSum
from diffalign.training.config import RunConfig
from tests.objectives.responses import averages, numbers, plain, responses, row_of


def summed_terms(*terms: Term) -> WeightedSum:
    return WeightedSum(terms=terms)


def mdpo(beta: float) -> WeightedSum:
    return summed_terms(
        Term(objective=DPO(beta=beta)),
        Term(objective=DPO(beta=beta), views={"rejected": "chosen@crop"}),
        Term(objective=Anchor(beta=beta)),
    )


def realign(beta: float) -> WeightedSum:
    return summed_terms(
        Term(objective=DPO(beta=beta)),
        Term(objective=DPO(beta=beta), views={"rejected": "chosen@retrieved"}),
    )


SUMS = {
    # TRL's DPOTrainer: objective, value of each pair, mean over the batch.
    "sigmoid .1": (DPO(beta=0.1), [0.644397, 0.713347, 0.649159], 0.668968),
    "sigmoid": (DPO(beta=0.5), [0.474077, 0.798139, 0.493249], 0.588488),
    "hinge": (Hinge(beta=0.5), [0.5, 1.2, 0.55], 0.75),
    "exo_pair": (EXO(beta=0.5), [1.945734, 3.110397, 2.021759], 2.359297),
    "nca_pair": (NCA(beta=0.5), [1.280602, 1.438168, 1.303753], 1.340841),
    "robust": (RobustDPO(beta=0.5), [0.411577, 0.823139, 0.436999], 0.557238),
    "bco_pair": (PairedBCO(beta=0.5), [1.152494, 1.489417, 1.181475], 1.274462),
    "sppo_hard": (SPPO(beta=0.5), [0.52, 2.9, 0.85], 1.423333),
    "apo_zero": (APO(beta=0.5), [0.875723, 1.049927, 0.888815], 0.938155),
    "apo_down": (APO(beta=0.5, form="down"), [0.951983, 1.037337, 0.988048], 0.992456),
    "forward_kl": (
        DivergenceDPO(beta=0.5, divergence="forward_kl"),
        [0.484930, 0.788378, 0.542568],
        0.605292,
    ),
    "js_divergence": (
        DivergenceDPO(beta=0.5, divergence="js"),
        [0.581315, 0.741786, 0.604172],
        0.642424,
    ),
    "alpha_divergence 2": (
        DivergenceDPO(beta=0.5, divergence="alpha", alpha=2.0),
        [0.446094, 0.810579, 0.416517],
        0.557730,
    ),
    # TRL's CPOTrainer, the second fed log-ratios.
    "CPO sigmoid": (CPO(beta=0.5, sft_weight=0.0), [0.386871, 0.565071, 1.804745], 0.918895),
    "cDPO": (ConservativeDPO(beta=0.5), [0.524077, 0.778139, 0.538249], 0.613488),
    # The authors' own functions.
    "mDPO .1": (mdpo(0.1), [1.966753, 2.089767, 1.986303], 2.014274),
    "mDPO": (mdpo(0.5), [1.561814, 2.137556, 1.650661], 1.783344),
    "Re-Align .1": (realign(0.1), [1.303156, 1.391607, 1.332357], 1.342373),
    "Re-Align": (realign(0.5), [1.007459, 1.419096, 1.137646], 1.188067),
    "TDPO1": (TDPO(beta=0.5, version=1), [0.483589, 0.883382, 0.446418], 0.604463),
    "TDPO2": (TDPO(beta=0.5, version=2), [0.478815, 0.840071, 0.469376], 0.596087),
    "CHiP cross-modal": (
        ReleasedCHiP(beta=0.5, token_beta=0.0),
        [0.355865, 0.718460, 0.455492],
        0.509939,
    ),
    "CHiP": (ReleasedCHiP(beta=0.5), [0.356614, 0.726175, 0.450937], 0.511242),
    "NPO": (NPO(beta=0.5), [2.392555, 3.083828, 2.673839], 2.716741),
}
AVERAGES = {
    # On means over tokens: the same of TRL.
    "ipo": (IPO(beta=0.5), [0.49, 1.3225, 0.5625], 0.791667),
    "sigmoid_norm": (DPO(beta=0.5), [0.620957, 0.731350, 0.632599], 0.661635),
    "simpo": (SimPO(beta=2.0, gamma=1.0), [1.081037, 1.313262, 2.171097], 1.521799),
    "simpo 2.5": (SimPO(beta=2.5, gamma=1.375), [1.282973, 1.600413, 2.753335], 1.878907),
    "tpo-l": (
        TriplePO(beta=2.0, gamma=1.0, sft_weight=0.0),
        [1.081037, 1.313262, 2.171097],
        1.521799,
    ),
}


def check(loss: torch.Tensor, each: list[float], mean: float, within: float = 1e-6) -> None:
    assert loss.dtype == torch.float64
    assert loss.tolist() == pytest.approx(each, abs=within)
    assert loss.mean().item() == pytest.approx(mean, abs=within)


@pytest.mark.parametrize("name", SUMS)
def test_values_on_sums_over_tokens(name):
    objective, each, mean = SUMS[name]
    check(objective(responses()).loss, each, mean)


@pytest.mark.parametrize("name", AVERAGES)
def test_values_on_means_over_tokens(name):
    objective, each, mean = AVERAGES[name]
    views = averages()
    check(objective({**views, "gold": views["chosen"]}).loss, each, mean)


def test_simpo_averages_sums_by_itself():
    check(SimPO(beta=2.0, gamma=1.0)(responses()).loss, [1.081037, 1.313262, 2.171097], 1.521799)


def test_alpha_divergence_one_half_that_trl_has_in_single_precision_alone():
    objective = DivergenceDPO(beta=0.5, divergence="alpha", alpha=0.5)
    check(objective(responses()).loss, [0.481451, 0.792961, 0.520704], 0.598372, within=2e-6)


def test_supervised_fine_tuning_is_the_mean_over_tokens():
    # Published per pair as the mean of each, which is what a pair alone gives.
    objective, views = SFT(), responses()
    assert objective(views).loss.mean().item() == pytest.approx(0.888889, abs=1e-6)
    each = [objective(row_of(views, row)).loss.item() for row in range(3)]
    assert each == pytest.approx([0.833333, 0.55, 1.1], abs=1e-6)
    assert SFT(per="response")(views).loss.tolist() == pytest.approx(each)
    assert SFT()(averages()).loss.tolist() == pytest.approx(each)


def test_triple_preference_optimisation():
    objective, views = TriplePO(beta=0.1), responses()
    assert objective(views).loss.mean().item() == pytest.approx(1.351925, abs=1e-6)
    each = [objective(row_of(views, row)).loss.item() for row in range(3)]
    assert each == pytest.approx([1.320957, 1.066025, 2.068793], abs=1e-6)


def test_odds_ratio():
    chosen, rejected = (log_odds(averages()[side].policy) for side in ("chosen", "rejected"))
    published = [-0.563686, -0.693147, -1.275064]
    ratio = torch.nn.functional.logsigmoid(chosen - rejected)
    check(ratio, published, -0.843966)
    # The loss adds it, weighted, to the mean over tokens.
    loss = ORPO(odds_weight=0.1)(responses()).loss.mean().item()
    assert loss == pytest.approx(0.888889 + 0.1 * 0.843966, abs=1e-6)


def test_alignment_term_of_aligned_fine_tuning():
    views = averages()
    loss = align_loss(views["chosen"].policy, views["rejected"].policy)
    assert loss.tolist() == pytest.approx([1.292008, 1.410264, 1.927147], abs=1e-6)


KTO_EACH = {
    # Mean log-ratio of mismatched responses -> the three chosen, the three rejected, their mean.
    0.05: ([0.431680, 0.518741, 0.407333], [0.443986, 0.531209, 0.481259], 0.469035),
    -0.3: ([0.425557, 0.512497, 0.401312], [0.450166, 0.537430, 0.487503], 0.469078),
}


@pytest.mark.parametrize("divergence", KTO_EACH)
def test_kahneman_tversky(divergence):
    mismatched = plain([divergence - 0.2, divergence + 0.2], [0.0, 0.0])
    views = {**responses(), "mismatched": mismatched}
    chosen, rejected, mean = KTO_EACH[divergence]

    def loss(**weights):
        return KTO(beta=0.5, baseline="mismatched", **weights)(views).loss

    check(2 * loss(undesirable_weight=0.0), chosen, sum(chosen) / 3)
    check(2 * loss(desirable_weight=0.0), rejected, sum(rejected) / 3)
    assert loss().mean().item() == pytest.approx(mean, abs=1e-6)


def test_kahneman_tversky_with_a_heavier_undesirable_side():
    views = {**responses(), "mismatched": plain([0.05], [0.0])}
    loss = KTO(beta=0.5, baseline="mismatched", undesirable_weight=1.5)(views).loss
    assert loss.mean().item() == pytest.approx(0.590406, abs=1e-6)


def test_binary_classifier_over_two_steps():
    objective, views = BCO(beta=0.5), responses()
    first = objective(views)
    assert first.metrics["delta"].item() == pytest.approx(0.0916667, abs=1e-6)
    each = [0.594396, 0.766487, 0.550817], [0.557910, 0.722739, 0.624820]
    pairs = [(chosen + rejected) / 2 for chosen, rejected in zip(*each, strict=True)]
    check(first.loss, pairs, 0.636195)

    moved = {
        side: Likelihoods(views[side].policy.detach() + change, views[side].reference)
        for side, change in (("chosen", 0.2), ("rejected", -0.3))
    }
    second = objective(moved)
    assert second.metrics["delta"].item() == pytest.approx(0.0791667, abs=1e-6)
    each = [0.545542, 0.707837, 0.504707], [0.501412, 0.654347, 0.563274]
    pairs = [(chosen + rejected) / 2 for chosen, rejected in zip(*each, strict=True)]
    check(second.loss, pairs, 0.579520)


def test_second_stage_of_povid():
    objective = summed_terms(
        Term(objective=DPO(beta=0.5), weight=0.5),
        Term(objective=DPO(beta=0.5), weight=0.5, views={"rejected": "own"}),
    )
    views = {**responses(), "own": plain([-2.2, -1.3, -3.9], [-2.0, -1.1, -4.0])}
    check(objective(views).loss, [0.493546, 0.733299, 0.513316], 0.580054)


@pytest.mark.parametrize(
    ("gamma", "mixed"), [(1.5, [-2.2, -1.15, -4.0]), (0.5, [-2.8, -1.05, -4.8])]
)
def test_mixed_scores_of_vision_guided_dpo(gamma, mixed):
    # The log-probabilities of the reference stand for those without the image.
    chosen = responses()["chosen"]
    scores = mixed_score(chosen.policy, chosen.reference, gamma=gamma)
    assert scores.tolist() == pytest.approx(mixed, abs=1e-6)


def test_opa_dpo_on_sums():
    """The sums of one sample with weights of scores and of errors for its tokens."""

    def weighed(policy, reference, weights):
        return plain(
            *(
                [sum(w * v for w, v in zip(weights, row, strict=True))]
                for row in (policy, reference)
            )
        )

    generated = [-0.8, -1.1, -0.4, -1.7], [-0.6, -1.3, -0.2, -1.5]
    revised = [-0.8, -1.0, -0.5], [-0.9, -1.2, -0.6]
    views = {
        "chosen": plain([-2.5], [-3.1]),
        "rejected": plain([-4.0], [-3.6]),
        "revised": plain([-2.3], [-2.7]),
        "revised:score": weighed(*revised, [1.0, 2.0, 2.0]),
        "rejected:score": weighed(*generated, [1.0, 2.0, 2.0, 1.0]),
        "chosen@pixels": plain([-3.6], [-3.5]),
        "revised:error": weighed(*revised, [1.0, 3.0, 3.0]),
        "revised:error@pixels": weighed([-1.3, -1.1, -0.8], [-1.1, -1.3, -0.7], [1.0, 3.0, 3.0]),
    }
    scores = {"chosen": "revised:score", "rejected": "rejected:score"}
    errors = {"chosen": "revised:error", "rejected": "revised:error@pixels"}
    dpo, anchor = DPO(beta=0.1), Anchor(beta=0.1)
    objective = summed_terms(
        Term(objective=dpo),
        Term(objective=dpo, views=scores),
        Term(objective=dpo, weight=0.2, views={"rejected": "chosen@pixels"}),
        Term(objective=dpo, weight=0.2, views=errors),
        Term(objective=anchor),
        Term(objective=anchor, views={"chosen": "revised"}),
    )
    output = objective(views)
    terms = ("dpo", "dpo_2", "dpo_3", "dpo_4", "anchor", "anchor_2")
    each = [output.metrics[f"{term}/loss"].item() for term in terms]
    assert each == pytest.approx(
        [0.644397, 0.639659, 0.658760, 0.649159, 0.663597, 0.673347], abs=1e-6
    )
    assert output.loss.item() == pytest.approx(2.882584, abs=1e-6)


def test_normalised_weights_of_changed_tokens():
    # The weight map divides by the sum of its weights; DPO is then the loss as published.
    chosen = plain([-1.071429, -0.55, -1.233333], [-1.242857, -0.5, -1.333333])
    rejected = plain([-0.833333, -0.435714, -0.791667], [-0.8, -0.507143, -0.741667])
    loss = DPO(beta=0.5)({"chosen": chosen, "rejected": rejected}).loss
    check(loss, [0.643266, 0.723965, 0.656350], 0.674527)


def test_soft_win_rates():
    views, rates = responses(), numbers([0.8, 0.6, 0.9])
    loss = sppo_loss(views["chosen"].log_ratio, rates, beta=0.5)
    loss = loss + sppo_loss(views["rejected"].log_ratio, 1 - rates, beta=0.5)
    assert loss.tolist() == pytest.approx([0.04, 0.34, 0.49], abs=1e-6)


def configured(name: str, beta: float) -> WeightedSum:
    """The objective of a config that is shipped, at another beta."""
    run = config.load(RunConfig, Path("configs") / name)
    assert isinstance(run.objective, WeightedSum)
    terms = [
        replace(term, objective=replace(term.objective, beta=beta))
        if hasattr(term.objective, "beta")
        else term
        for term in run.objective.terms
    ]
    return replace(run.objective, terms=tuple(terms))


def test_mpo_of_trl_has_a_threshold_of_zero():
    objective = summed_terms(
        Term(objective=DPO(beta=0.5), weight=0.8),
        Term(objective=PairedBCO(beta=0.5), weight=0.2),
        Term(objective=SFT(), weight=1.0),
    )
    views = responses()
    loss = objective(views).loss
    loss.mean().backward()
    assert loss.mean().item() == pytest.approx(1.614571882776, abs=1e-11)
    each = [objective(row_of(responses(), row)).loss.item() for row in range(3)]
    assert each == pytest.approx([1.443093743447, 1.486394434666, 1.730894136881], abs=1e-11)
    slopes = [-0.175635116390, -0.201505557302, -0.176402957914]
    assert views["chosen"].policy.grad.tolist() == pytest.approx(slopes, abs=1e-10)
    slopes = [0.065344289263, 0.091225527820, 0.068164855591]
    assert views["rejected"].policy.grad.tolist() == pytest.approx(slopes, abs=1e-10)


def test_mpo_of_internvl_has_the_mean_reward_so_far():
    """`trainer_dpo.py` of InternVL over two steps, whose running mean is kept in float32."""
    objective, views = configured("mpo/llava15_7b.yaml", beta=0.5), responses()
    found = objective(views)
    assert found.loss.mean().item() == pytest.approx(1.614157516068, abs=1e-6)
    assert found.metrics["bco/delta"].item() == pytest.approx(0.091666668653, abs=1e-6)
    moved = {
        side: replace(views[side], policy=views[side].policy.detach() + change)
        for side, change in (("chosen", 0.2), ("rejected", -0.3))
    }
    second = objective(moved)
    assert second.loss.mean().item() == pytest.approx(1.442967972964, abs=1e-6)
    assert second.metrics["bco/delta"].item() == pytest.approx(0.079166669399, abs=1e-6)


def test_rpo_adds_a_little_of_the_chosen_response():
    loss = configured("rpo/llava15_7b.yaml", beta=0.5)(responses()).loss
    assert loss.mean().item() == pytest.approx(0.592932710964, abs=1e-11)
    objective = summed_terms(Term(objective=DPO(beta=0.5)), Term(objective=SFT()))
    assert objective(responses()).loss.mean().item() == pytest.approx(1.477377155409, abs=1e-11)


def test_severity_multiplies_policy_and_reference_of_the_rejected_response():
    """HSA-DPO: `base_dpo_trainer.py` of its authors, by scores 1.5, 1 and 3."""
    views, severity = responses(), numbers([1.5, 1.0, 3.0])
    rejected = views["rejected"]
    # As a map of weights does it that gives every token of a response its severity.
    views["rejected"] = Likelihoods(severity * rejected.policy, severity * rejected.reference)
    check(
        DPO(beta=0.5)(views).loss,
        [0.437487950486, 0.798138869382, 0.455492481463],
        0.563706433777,
        within=1e-11,
    )
    assert DPO(beta=0.1)(views).loss.mean().item() == pytest.approx(0.662650729149, abs=1e-11)
