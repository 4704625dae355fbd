from __future__ import annotations

import pytest
import torch

from diffalign.objectives.dpo import dpo_loss
from diffalign.objectives.robust import RobustDPO, robust_loss
from tests.objectives.responses import numbers

REWARDS = numbers([1.5, -0.5, 0.0, 4.0])


def test_value_published_for_denoising_errors():
    loss = robust_loss(REWARDS, beta=1.0, flip_rate=0.1).mean()
    assert loss.item() == pytest.approx(0.315446842650, abs=1e-10)


def test_in_expectation_over_flipped_labels_it_is_dpo_on_clean_ones():
    as_labelled = robust_loss(REWARDS, beta=0.5, flip_rate=0.3)
    flipped = robust_loss(-REWARDS, beta=0.5, flip_rate=0.3)
    assert torch.allclose(0.7 * as_labelled + 0.3 * flipped, dpo_loss(REWARDS, beta=0.5))


@pytest.mark.parametrize("flip_rate", [-0.1, 0.5])
def test_a_flip_rate_at_which_labels_say_nothing_is_refused(flip_rate):
    with pytest.raises(ValueError, match=r"flip_rate must be at least 0 and below 0\.5"):
        RobustDPO(beta=0.1, flip_rate=flip_rate)
