"""Self-play and regression on judged responses: other losses, given a target, a label or a rate.

One prompt with four responses, who is preferred to whom among them, and logits of the policy;
values and gradients are those of the authors' own functions.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffalign.objectives.base import Likelihoods
from diffalign.objectives.dpo import DPO
from diffalign.objectives.margin_regression import MarginRegression
from diffalign.objectives.sppo import sppo_loss
from diffalign.pair_judges.base import every_pair, win_rates
from tests.objectives.responses import numbers, responses

PREFERRED = torch.tensor(
    [[0.5, 0.8, 0.6, 0.9], [0.2, 0.5, 0.7, 0.4], [0.4, 0.3, 0.5, 0.55], [0.1, 0.6, 0.45, 0.5]],
    dtype=torch.float64,
)
"""Probability that the response of a row is preferred to that of a column."""
LOGITS, OF_REFERENCE = numbers([0.3, -0.1, 0.2, -0.4]), numbers([0.0, 0.25, -0.25, 0.1])
BETA, RATE = 0.5, 0.3
FIRST, SECOND = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T


def rates_against(opponent: Tensor) -> Tensor:
    """How often each response wins against those that a policy of some logits samples."""
    return PREFERRED @ opponent.softmax(dim=0)


def regression(
    logits: Tensor, target: Tensor, *, sampled: bool = False
) -> tuple[float, list[float], list[float]]:
    """Loss over all ordered pairs of two responses, its gradient, and the logits a step later.

    Args:
        logits: of the policy.
        target: of the reward margin of each ordered pair, times beta.
        sampled: whether pairs are as frequent as the policy samples them, and not all alike.
    """
    logits = logits.clone().requires_grad_()
    log_policy = logits.log_softmax(dim=0)
    log_reference = OF_REFERENCE.log_softmax(dim=0)
    views = {
        side: Likelihoods(log_policy[rows], log_reference[rows], target=target)
        for side, rows in (("chosen", FIRST), ("rejected", SECOND))
    }
    loss = MarginRegression(beta=BETA, divided_by_beta=True)(views).loss
    policy = log_policy.detach().exp()
    frequency = policy[FIRST] * policy[SECOND] if sampled else torch.full_like(loss, 1 / len(loss))
    total = (frequency * loss).sum()
    total.backward()
    after = logits.detach() - RATE * logits.grad
    return total.item(), logits.grad.tolist(), after.tolist()


def gaps(rates: Tensor) -> Tensor:
    return rates[FIRST] - rates[SECOND]


MIXTURE = 0.85 * LOGITS.log_softmax(dim=0) + 0.15 * OF_REFERENCE.log_softmax(dim=0)
"""Of policy and reference, in logits, for a rate of 0.3 times a beta of 0.5."""
GAMES = {
    # zhourunlong/EGPO, simulations/loss_funcs.py: target, how pairs are sampled, loss, gradient.
    "online IPO 1": (
        gaps(rates_against(LOGITS)),
        False,
        0.232383225973,
        [-0.037461549804, -0.258451067028, 0.567946779608, -0.272034162775],
    ),
    "online IPO 2": (
        PREFERRED[FIRST, SECOND] - 0.5,
        True,
        0.286434121409,
        [-0.120046201624, -0.273367953898, 0.604713620077, -0.211299464555],
    ),
    "IPO-MD and Nash-MD": (
        gaps(rates_against(MIXTURE)),
        False,
        0.237212225003,
        [-0.047466331252, -0.249435648065, 0.576164598407, -0.279262619089],
    ),
}


@pytest.mark.parametrize("game", GAMES)
def test_a_game_is_a_margin_that_is_regressed(game):
    target, sampled, loss, gradient = GAMES[game]
    found, slopes, _ = regression(LOGITS, target, sampled=sampled)
    assert found == pytest.approx(loss, abs=1e-11)
    assert slopes == pytest.approx(gradient, abs=1e-11)


def test_extragradient_regresses_on_rates_against_a_look_ahead():
    """EGPO: both steps begin at the same logits; the second has the rates against the first."""
    _, _, ahead = regression(LOGITS, gaps(rates_against(LOGITS)))
    loss, slopes, after = regression(LOGITS, gaps(rates_against(numbers(ahead))))
    assert loss == pytest.approx(0.232213204007, abs=1e-11)
    assert slopes == pytest.approx(
        [-0.057112502050, -0.237132788250, 0.572353444498, -0.278108154199], abs=1e-11
    )
    assert after == pytest.approx(
        [0.317133750615, -0.028860163525, 0.028293966651, -0.316567553740], abs=1e-11
    )


@pytest.mark.parametrize(
    ("opponent", "of_first"),
    [
        (LOGITS, [0.0, 0.429010482776, 0.455408329412, 0.565427387029]),
        (
            0.875 * LOGITS.log_softmax(dim=0) + 0.125 * OF_REFERENCE.log_softmax(dim=0),
            [0.0, 0.444843588459, 0.470568602198, 0.567742941688],
        ),
    ],
    ids=["policy", "mixture"],
)
def test_targets_of_the_first_response(opponent, of_first):
    """A margin is at rest where it is the gap of the rates over beta."""
    rates = rates_against(opponent)
    assert ((rates[0] - rates) / BETA).tolist() == pytest.approx(of_first, abs=1e-11)
    at_rest = {
        "chosen": Likelihoods(numbers(of_first), torch.zeros(4), target=rates[0] - rates),
        "rejected": Likelihoods(torch.zeros(4), torch.zeros(4), target=rates[0] - rates),
    }
    loss = MarginRegression(beta=BETA, divided_by_beta=True)(at_rest).loss
    assert loss.tolist() == pytest.approx([0.0] * 4, abs=1e-18)


PAIRS = every_pair(4)
RATES = numbers(win_rates(4, PAIRS, [PREFERRED[pair].item() for pair in PAIRS]))


def test_win_rates_among_the_responses_to_a_question():
    """uclaml/SPPO counts each response as half a win against itself: among n it is then nearer to
    a half by (n - 1) / n, which a beta larger by n / (n - 1) makes up for."""
    without = [0.766666666667, 0.433333333333, 0.416666666667, 0.383333333333]
    assert RATES.tolist() == pytest.approx(without, abs=1e-11)
    with_itself = 0.5 + (RATES - 0.5) * 3 / 4
    assert with_itself.tolist() == pytest.approx([0.7, 0.45, 0.4375, 0.4125], abs=1e-11)
    assert with_itself.tolist() == pytest.approx(PREFERRED.mean(dim=1).tolist(), abs=1e-11)


@pytest.mark.parametrize(
    ("beta", "targets"),
    [
        (0.5, [0.533333333333, -0.133333333333, -0.166666666667, -0.233333333333]),
        (0.5 * 4 / 3, [0.4, -0.1, -0.125, -0.175]),
    ],
    ids=["without itself", "with itself"],
)
def test_sppo_rests_at_the_win_rate_over_beta(beta, targets):
    ratio = numbers(targets).requires_grad_()
    loss = sppo_loss(ratio, RATES, beta=beta)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.0] * 4, abs=1e-20)
    assert ratio.grad.tolist() == pytest.approx([0.0] * 4, abs=1e-10)
    moved = sppo_loss(numbers(targets) + 0.1, RATES, beta=beta)
    assert moved.tolist() == pytest.approx([0.01] * 4, abs=1e-11)


def test_scores_of_responses_as_win_rates():
    """PairRM scores as uclaml/SPPO makes probabilities and rates of them, each counted itself."""
    scores = numbers([1.2, -0.3, 0.5, -1.0, 0.1])
    pairs = every_pair(5)
    preferred = [torch.sigmoid(scores[i] - scores[j]).item() for i, j in pairs]
    found = 0.5 + (numbers(win_rates(5, pairs, preferred)) - 0.5) * 4 / 5
    published = [0.727254372967, 0.412390230947, 0.587609769053, 0.272745627033, 0.5]
    assert found.tolist() == pytest.approx(published, abs=1e-11)


def test_dno_is_dpo_of_preferences_that_rates_give():
    rates = rates_against(OF_REFERENCE)
    published = [0.717168113354, 0.438877852361, 0.427651932353, 0.425494790734]
    assert rates.tolist() == pytest.approx(published, abs=1e-11)
    first, second = torch.tensor(PAIRS).T
    log_ratios = LOGITS.log_softmax(dim=0) - OF_REFERENCE.log_softmax(dim=0)
    preference = torch.sigmoid(rates[first] - rates[second])
    views = {
        side: Likelihoods(log_ratios[rows], torch.zeros_like(preference), preference=preference)
        for side, rows in (("chosen", first), ("rejected", second))
    }
    loss = DPO(beta=BETA)(views).loss
    each = [0.683826326086, 0.699240966970, 0.684052956171]
    each += [0.714137832612, 0.693599212167, 0.720832927403]
    assert loss.tolist() == pytest.approx(each, abs=1e-11)
    assert loss.mean().item() == pytest.approx(0.699281703568, abs=1e-11)


def regressed(views: dict[str, Likelihoods], target: Tensor) -> dict[str, Likelihoods]:
    return {side: replace(views[side], target=target) for side in ("chosen", "rejected")}


def test_inpo_is_a_margin_that_is_regressed():
    """The reference is the last iterate; the target has the run's first policy in it."""
    eta, tau = 0.5, 0.2
    last = {"chosen": numbers([-2.8, -1.05, -4.9]), "rejected": numbers([-3.8, -1.8, -1.1])}
    views = responses()
    of_first = views["chosen"].reference - views["rejected"].reference
    target = tau / eta * (of_first - (last["chosen"] - last["rejected"])) + 1 / (2 * eta)
    views = {side: replace(views[side], reference=last[side]) for side in last}
    loss = MarginRegression(beta=1.0)(regressed(views, target)).loss
    assert loss.tolist() == pytest.approx([0.09, 1.6384, 0.0961], abs=1e-11)


def test_online_ipo_is_a_margin_that_is_regressed():
    """OMD of zhourunlong/EGPO: targets are gaps of win rates against what the policy samples."""
    rates = numbers([0.8, 0.55, 0.9]), numbers([0.3, 0.5, 0.2])
    views = regressed(responses(), rates[0] - rates[1])
    loss = MarginRegression(beta=0.5, divided_by_beta=True)(views).loss
    assert loss.tolist() == pytest.approx([0.0, 0.25, 0.25], abs=1e-11)
