from __future__ import annotations

import dataclasses

import pytest
import torch

from diffalign.models.vlm.token_scores import token_log_probs, token_typicality
from diffalign.objectives.anchor import Anchor
from diffalign.objectives.aot import AOT
from diffalign.objectives.base import Likelihoods
from diffalign.objectives.bco import BCO
from diffalign.objectives.dpo import DPO
from diffalign.objectives.hinge import Hinge
from diffalign.objectives.ipo import IPO
from diffalign.objectives.mapo import MaPO
from diffalign.objectives.sft import SFT
from diffalign.objectives.wpo import WPO, typicality_weight
from tests.objectives.responses import CHOSEN, REJECTED, numbers, responses

EXPECTED = {
    # log sum p^2 at each token, next to the published log-probabilities.
    "chosen": [[-0.4, -0.9, -0.6], [-0.3, -0.8], [-1.0, -0.2, -1.2, -0.5]],
    "rejected": [[-0.5, -0.7, -0.3, -1.1], [-0.4, -0.6, -0.3], [-0.7, -0.15]],
}
WEIGHTS = [0.576949810380, 0.889881770988, 0.591555364367]
PUBLISHED = {
    # TRL with use_weighting: each pair, the mean, its slopes in a token of each chosen response.
    "dpo": (
        DPO(beta=0.5),
        [0.273518626128, 0.710249230580, 0.291784059973],
        0.425183972227,
        [-0.036303669546, -0.081547875213, -0.038388074972],
    ),
    "dpo .1": (
        DPO(beta=0.1),
        [0.371784530839, 0.634794640502, 0.384013689329],
        0.463530953557,
        [-0.009135438924, -0.015127950563, -0.009415888782],
    ),
}


def typical_responses() -> dict[str, Likelihoods]:
    """The three pairs, with how typical their responses are."""
    views = responses()
    rows = {"chosen": CHOSEN[0], "rejected": REJECTED[0]}
    for side, expected in EXPECTED.items():
        means = [
            sum(own) / len(own) - sum(other) / len(other)
            for own, other in zip(rows[side], expected, strict=True)
        ]
        views[side] = dataclasses.replace(views[side], typicality=numbers(means))
    return views


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_and_gradients(name):
    objective, each, mean, slopes = PUBLISHED[name]
    views = typical_responses()
    output = WPO(objective=objective)(views)
    output.loss.mean().backward()
    assert output.loss.tolist() == pytest.approx(each, abs=1e-10)
    assert output.loss.mean().item() == pytest.approx(mean, abs=1e-10)
    assert views["chosen"].policy.grad.tolist() == pytest.approx(slopes, abs=1e-10)
    opposite = [-slope for slope in slopes]
    assert views["rejected"].policy.grad.tolist() == pytest.approx(opposite, abs=1e-10)
    assert output.metrics["pair_weight"].tolist() == pytest.approx(WEIGHTS, abs=1e-10)


def test_sorted_pairs_have_their_own_weights():
    """TRL multiplies the loss of the n-th smallest margin by the weight of the n-th pair."""
    views = typical_responses()
    output = WPO(objective=AOT(beta=0.5))(views)
    of_pairs = AOT(beta=0.5)(views).loss
    assert output.loss.tolist() == pytest.approx((of_pairs * numbers(WEIGHTS)).tolist())
    margins = views["chosen"].policy - views["rejected"].policy
    theirs = (of_pairs[margins.argsort()] * numbers(WEIGHTS)).mean()
    assert theirs.item() == pytest.approx(0.408205169746, abs=1e-10)


def test_it_weighs_a_loss_of_means_over_tokens():
    views = typical_responses()
    averaged = {
        side: Likelihoods(
            views[side].average,
            views[side].reference / views[side].length,
            typicality=views[side].typicality,
        )
        for side in ("chosen", "rejected")
    }
    loss = WPO(objective=IPO(beta=0.5))(averaged).loss.mean()
    assert loss.item() == pytest.approx(0.597441313891, abs=1e-10)


def test_weights_above_one_are_held_there_as_the_authors_do_and_trl_does_not():
    rows = {
        "chosen": ([[0.0, 0, 0], [2, 1, 0], [0, 0.5, 3]], [0, 0, 2], -1.630091211482),
        "rejected": ([[0.0, 0, 0], [3, 0, 0], [0, 3, 0]], [0, 0, 1], -1.288458201510),
    }
    typical = []
    for logits, tokens, score in rows.values():
        logits, tokens = torch.tensor(logits, dtype=torch.float64), torch.tensor(tokens)
        assert token_log_probs(logits, tokens[:, None]).sum().item() == pytest.approx(score)
        typical.append(token_typicality(logits, tokens).mean()[None])
    assert typicality_weight(*typical, clamp=False).item() == pytest.approx(1.204955620247)
    assert typicality_weight(*typical).item() == 1.0
    views = {
        side: Likelihoods(numbers([0.3]), numbers([0.1]), typicality=value)
        for side, value in zip(rows, typical, strict=True)
    }
    alone = DPO(beta=0.5)(views).loss
    assert torch.equal(WPO(objective=DPO(beta=0.5))(views).loss, alone)
    unclamped = WPO(objective=DPO(beta=0.5), clamp=False)(views).loss
    assert unclamped.item() == pytest.approx(1.204955620247 * alone.item())


@pytest.mark.parametrize("objective", [Hinge(beta=0.5), IPO(beta=0.5)])
def test_any_loss_of_pairs_can_be_differentiated(objective):
    """TRL multiplies in place, under which its hinge fails in the backward pass."""
    views = typical_responses()
    WPO(objective=objective)(views).loss.sum().backward()
    weighted = views["chosen"].policy.grad
    plain = responses()
    objective(plain).loss.sum().backward()
    expected = plain["chosen"].policy.grad * numbers(WEIGHTS)
    assert weighted.tolist() == pytest.approx(expected.tolist(), abs=1e-10)


def test_weights_have_no_gradient():
    views = typical_responses()
    typicality = numbers([0.1, -0.2, 0.0]).requires_grad_()
    views["chosen"] = dataclasses.replace(views["chosen"], typicality=typicality)
    WPO(objective=DPO(beta=0.5))(views).loss.sum().backward()
    assert typicality.grad is None


def test_it_needs_what_its_loss_needs_and_gives_back_its_memory():
    weighted = WPO(objective=BCO(beta=0.5))
    assert weighted.must_know == "log_ratios" and weighted.needs_measured == {"typicality"}
    weighted(typical_responses())
    again = WPO(objective=BCO(beta=0.5))
    again.load_state_dict(weighted.state_dict())
    assert again.state_dict() == weighted.state_dict() != {}
    assert WPO(objective=DPO(beta=0.5)).note().startswith("dpo, each pair by how typical")


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (SFT(), "objective compares chosen, and a weight is one of a chosen and a rejected"),
        (Anchor(beta=1.0), "take a loss of both, such as dpo"),
        (MaPO(beta=1.0), "objective has a meaning for a denoising error, and a weight is made of"),
    ],
)
def test_a_loss_without_a_pair_of_responses_is_refused(objective, message):
    with pytest.raises(ValueError, match=message):
        WPO(objective=objective)
