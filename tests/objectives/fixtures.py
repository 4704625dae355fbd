"""The inputs on which published values were made, and what the formulas give on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffalign.likelihoods.denoising import denoising_log_likelihood
from diffalign.objectives.base import AbstractObjective, Likelihoods


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal samples of numpy's frozen generator, float64."""
    return torch.tensor(np.random.RandomState(seed).standard_normal(shape))


def denoised_pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of policy and reference and their target; rows 0-2 chosen, 3-5 rejected."""
    noise = normal(0, 3, 4, 8, 8)
    target = torch.cat([noise, noise])
    policy = target + 0.1 * normal(1, 6, 4, 8, 8)
    reference = target + 0.1 * normal(2, 6, 4, 8, 8)
    return policy.to(dtype), reference.to(dtype), target.to(dtype)


def denoised_views(
    policy: Tensor, reference: Tensor, target: Tensor, names: tuple[str, str]
) -> dict[str, Likelihoods]:
    """The pairs as two views of denoising likelihoods, with the distances of policy and
    reference."""
    sides = zip(policy.chunk(2), reference.chunk(2), target.chunk(2), strict=True)
    return {
        name: Likelihoods(
            denoising_log_likelihood(of_policy, wanted),
            denoising_log_likelihood(of_reference, wanted),
            distance=(of_policy - of_reference).square().flatten(start_dim=1).mean(dim=1),
        )
        for name, (of_policy, of_reference, wanted) in zip(names, sides, strict=True)
    }


def denoised_gradients(
    objective: AbstractObjective, dtype: torch.dtype = torch.float64, *, scale: float = 1.0
) -> tuple[float, tuple[float, float, float]]:
    """Mean loss of the pairs, and the norm of its gradient in the predictions: of all rows, of the
    chosen ones and of the rejected ones. Errors of the policy are `scale` times as large."""
    policy, reference, target = denoised_pairs(dtype)
    policy = (target + scale * (policy - target)).requires_grad_()
    views = denoised_views(policy, reference, target, ("chosen", "rejected"))
    loss = objective(views).loss.mean()
    loss.backward()
    assert policy.grad is not None
    parts = (policy.grad, *policy.grad.chunk(2))
    whole, chosen, rejected = (part.norm().item() for part in parts)
    return loss.item(), (whole, chosen, rejected)


_BETAS = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
KEPT = torch.tensor(np.cumprod(1 - _BETAS))
"""Share of the image's variance at each training timestep of Stable Diffusion."""
STEPS = torch.tensor([501, 101, 951])
"""Timesteps of the three rows; 20 steps of 50 each, eta 1."""


def gaussian_step(prediction: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of one reverse step from STEPS, the latter of shape [3, 1, 1, 1].

    Written out here from the formula of DDIM (arXiv:2010.02502, eq. 12 and 16), so that tests of
    the package do not rest on the package.
    """
    kept, kept_next = (KEPT[t].view(-1, 1, 1, 1) for t in (STEPS, STEPS - 50))
    std = ((1 - kept_next) / (1 - kept) * (1 - kept / kept_next)).sqrt()
    denoised = (noisy - (1 - kept).sqrt() * prediction) / kept.sqrt()
    return kept_next.sqrt() * denoised + (1 - kept_next - std**2).sqrt() * prediction, std


def step_log_density(outcome: Tensor, prediction: Tensor, noisy: Tensor) -> Tensor:
    """Mean log-density over the elements of each outcome, shape [3]."""
    mean, std = gaussian_step(prediction, noisy)
    log_density = -((outcome - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return log_density.flatten(start_dim=1).mean(dim=1)


@dataclass(frozen=True)
class Step:
    """One reverse step of each of three rows under policy and reference, all [3, 4, 8, 8]."""

    noisy: Tensor
    outcome: Tensor
    policy: Tensor
    reference: Tensor

    def log_ratio(self) -> Tensor:
        """Policy minus reference, shape [3]."""
        return step_log_density(self.outcome, self.policy, self.noisy) - step_log_density(
            self.outcome, self.reference, self.noisy
        )


def _step(noisy: Tensor, *, reference: int, policy: int, noise: int) -> Step:
    """One step; the arguments by name are seeds."""
    predicted = normal(reference, 3, 4, 8, 8)
    mean, std = gaussian_step(predicted, noisy)
    moved = (predicted + 0.02 * normal(policy, 3, 4, 8, 8)).requires_grad_()
    return Step(noisy, mean + std * normal(noise, 3, 4, 8, 8), moved, predicted)


def sampled_steps() -> tuple[Step, Step]:
    """Steps of two trajectories, each from its own state; float64, the policies take gradient."""
    first = _step(normal(10, 3, 4, 8, 8), reference=12, policy=14, noise=16)
    second = _step(normal(11, 3, 4, 8, 8), reference=13, policy=15, noise=17)
    return first, second


def candidate_steps() -> tuple[Step, Step]:
    """Two outcomes of one step from a shared state; float64, the policies take gradient."""
    noisy = normal(10, 3, 4, 8, 8)
    chosen, rejected = (_step(noisy, reference=12, policy=14, noise=noise) for noise in (16, 18))
    return chosen, rejected
