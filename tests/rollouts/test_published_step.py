"""The published values of SPO, through batch, likelihood and objective as a run has them."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from diffalign.data.batches import StepBatch
from diffalign.likelihoods.transition import Transition
from diffalign.objectives.base import Likelihoods
from diffalign.objectives.clipped_dpo import ClippedDPO
from tests.objectives.fixtures import STEPS, candidate_steps
from tests.rollouts.linear_model import NOISING

LOSSES = {0.1: 0.708723127991, 0.002: 0.706913539785}
LOG_RATIOS = {
    "chosen": [-0.001544817756, -0.000877234459, -0.002553764234],
    "rejected": [0.001986632077, 0.002518132753, -0.000208756298],
}


class Recited:
    """A model that knows its predictions by heart, one for each of three states."""

    noising = NOISING
    device = torch.device("cpu")
    autoencoder = SimpleNamespace(factor=8)

    def __init__(self, policy, reference):
        self._policy, self._reference = policy, reference
        self._referred = False
        self.evaluations = 0

    @contextmanager
    def reference(self):
        self._referred = True
        yield
        self._referred = False

    def denoiser(self, prompts, *, guidance, size):
        def denoise(noisy, time):
            assert time.tolist() == STEPS.tolist()
            self.evaluations += len(noisy)
            return self._reference if self._referred else self._policy

        return denoise


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_two_candidates_of_a_shared_state_give_the_published_loss(dtype, within):
    chosen, rejected = candidate_steps()
    assert torch.equal(chosen.policy, rejected.policy)  # one state, one prediction
    batch = StepBatch(
        sample_ids=("a", "b", "c"),
        states=chosen.noisy.to(dtype),
        prompts=("", "", ""),
        t=STEPS,
        t_next=STEPS - 50,
        state_rows=dict.fromkeys(("chosen", "rejected"), torch.arange(3)),
        outcomes={"chosen": chosen.outcome.to(dtype), "rejected": rejected.outcome.to(dtype)},
    )
    model = Recited(chosen.policy.detach().to(dtype), chosen.reference.to(dtype))
    likelihood = Transition()
    prepared = likelihood.prepare(model, batch)
    with model.reference():
        reference = likelihood.evaluate(model, prepared)
    policy = likelihood.evaluate(model, prepared)
    views = {view: Likelihoods(policy[view], reference[view]) for view in policy}
    assert model.evaluations == 2 * 3  # policy and reference, once per state
    for view, published in LOG_RATIOS.items():
        assert views[view].log_ratio.tolist() == pytest.approx(published, abs=within)
    for clip, published in LOSSES.items():
        loss = ClippedDPO(beta=10.0, clip=clip)(views).loss.mean().item()
        assert loss == pytest.approx(published, abs=within)
