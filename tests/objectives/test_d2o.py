"""Values of the formula of arXiv:2403.03419, by another implementation in float64."""

from __future__ import annotations

import pytest

from diffalign.objectives.d2o import D2O
from diffalign.objectives.dpo import DPO
from tests.objectives.responses import plain, responses

SAMPLED = ("first", "second")


def views():
    """The three rejected responses, next to two sampled ones each, by log-ratios."""
    columns = {"first": [0.3, -0.2, 0.1], "second": [0.5, 0.0, -0.4]}
    return {**responses(), **{name: plain(v, [0.0] * 3) for name, v in columns.items()}}


@pytest.mark.parametrize(
    ("beta", "alpha", "each", "mean"),
    [
        (0.5, 0.3, [0.545892937180, 0.765595182337, 0.715900284205], 0.675796134574),
        (0.1, 0.1, [0.653946967318, 0.713347167228, 0.695650305557], 0.687648146701),
    ],
)
def test_values_and_gradient(beta, alpha, each, mean):
    found = views()
    loss = D2O(beta=beta, alpha=alpha, sampled=SAMPLED)(found).loss
    loss.mean().backward()
    assert loss.tolist() == pytest.approx(each, abs=1e-11)
    assert loss.mean().item() == pytest.approx(mean, abs=1e-11)
    own, lost = found["first"].policy.grad, found["rejected"].policy.grad
    assert (own < 0).all()
    assert lost.tolist() == pytest.approx((-own * 2 * alpha / beta).tolist())  # K = 2


def test_one_sampled_response_and_one_beta_is_dpo():
    found = views()
    loss = D2O(beta=0.5, alpha=0.5, sampled=("first",))(found).loss
    pair = {"chosen": found["first"], "rejected": found["rejected"]}
    assert loss.tolist() == pytest.approx(DPO(beta=0.5)(pair).loss.tolist())


@pytest.mark.parametrize("sampled", [(), ("rejected",)])
def test_nothing_to_compare_with_is_refused(sampled):
    with pytest.raises(ValueError, match="views that the rejected one is compared with"):
        D2O(beta=0.1, alpha=0.1, sampled=sampled)
