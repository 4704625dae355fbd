from __future__ import annotations

import pytest

from diffalign.objectives.tpo import TriplePO
from tests.objectives.responses import responses


def test_only_the_gold_response_is_learnt_outright():
    views = responses()
    TriplePO(beta=1e-9)(views).loss.mean().backward()
    # Six tokens of gold.
    assert views["gold"].policy.grad.tolist() == pytest.approx([-1 / 6] * 3)
    assert views["chosen"].policy.grad.abs().max().item() < 1e-9


@pytest.mark.parametrize("name", ["gamma", "sft_weight"])
def test_negative_settings_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0"):
        TriplePO(beta=0.1, **{name: -1.0})
