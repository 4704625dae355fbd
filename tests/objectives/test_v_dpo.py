from __future__ import annotations

import pytest
import torch

from diffalign.objectives.base import Likelihoods
from diffalign.objectives.dpo import DPO, dpo_loss
from diffalign.objectives.v_dpo import VDPO
from tests.objectives.responses import plain, responses

BLIND = ([-3.0, -1.5, -4.6], [-3.2, -1.3, -5.0]), ([-3.9, -1.8, -1.5], [-3.7, -2.0, -1.2])
"""Policy and reference of the chosen and of the rejected responses without their images."""


def views(condition: str = "zero") -> dict[str, Likelihoods]:
    return {
        **responses(),
        f"chosen@{condition}": plain(*BLIND[0]),
        f"rejected@{condition}": plain(*BLIND[1]),
    }


def test_with_images_alone_it_is_dpo():
    assert torch.allclose(VDPO(beta=0.5, gamma=1.0)(views()).loss, DPO(beta=0.5)(responses()).loss)


@pytest.mark.parametrize(("blind", "which"), [("policy", 0), ("reference", 1)])
def test_the_first_pair_worked_by_hand(blind, which):
    output = VDPO(beta=0.5, gamma=0.4, blind=blind)(views())
    chosen = 0.4 * -2.5 + 0.6 * BLIND[0][which][0] + 3.1
    rejected = 0.4 * -4.0 + 0.6 * BLIND[1][which][0] + 3.6
    expected = dpo_loss(torch.tensor(chosen - rejected), beta=0.5).item()
    assert output.loss[0].item() == pytest.approx(expected, abs=1e-6)


def test_only_what_is_seen_carries_gradient():
    batch = views()
    VDPO(beta=0.5, gamma=0.4)(batch).loss.sum().backward()
    assert (batch["chosen"].policy.grad < 0).all()
    assert batch["chosen@zero"].policy.grad is batch["rejected@zero"].policy.grad is None


def test_another_condition_may_stand_for_blindness():
    objective = VDPO(beta=0.5, gamma=0.4, condition="noise")
    assert objective.views == {"chosen", "rejected", "chosen@noise", "rejected@noise"}
    expected = VDPO(beta=0.5, gamma=0.4)(views()).loss
    assert torch.equal(objective(views("noise")).loss, expected)


def test_the_released_gamma_is_refused():
    with pytest.raises(ValueError, match=r"gamma must be greater than 0.*nothing is learnt"):
        VDPO(beta=0.1, gamma=0.0)


def test_a_condition_is_a_name():
    with pytest.raises(ValueError, match="names no view"):
        VDPO(beta=0.1, gamma=0.5, condition="all black")
