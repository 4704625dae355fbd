from __future__ import annotations

import math

import pytest

from diffalign.objectives.cpo import CPO
from tests.objectives.responses import responses


def test_both_terms_reach_the_gradient():
    views = responses()
    output = CPO(beta=0.5, sft_weight=2.0)(views)
    output.loss.sum().backward()
    # Of the first pair: logit .5 * 1.5; nine tokens in three responses.
    slope = 0.5 / (1 + math.exp(0.75))
    assert views["chosen"].policy.grad[0].item() == pytest.approx(-slope - 2 / 3)
    assert views["rejected"].policy.grad[0].item() == pytest.approx(slope)
    assert output.metrics["supervised_term"].mean().item() == pytest.approx(8 / 9)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="sft_weight must be at least 0"):
        CPO(beta=0.5, sft_weight=-1.0)
