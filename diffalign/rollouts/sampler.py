"""Sampling whole trajectories, with the density of every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.likelihoods.transition import transition_log_likelihood
from diffalign.models.devices import send
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.noising import AbstractVariancePreserving
from diffalign.models.diffusion.reverse import ReverseProcess, reverse_step
from diffalign.seeding import noise_from_seeds


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """n ways from noise to an image in S steps, on the CPU."""

    latents: Tensor
    """Float32 [S + 1, n, channels, h, w]: the start noise, then where each step arrived."""
    log_likelihoods: Tensor
    """Of each step under the model that took it, float32 [S, n]: mean over a latent's numbers; NaN
    for steps without noise."""
    times: tuple[tuple[int, int], ...]
    """S pairs of timesteps: where each step leaves from and arrives."""

    def part(self, start: int, stop: int) -> Trajectories:
        """Trajectories `start` to `stop`, the latter excluded."""
        return Trajectories(
            latents=self.latents[:, start:stop],
            log_likelihoods=self.log_likelihoods[:, start:stop],
            times=self.times,
        )


def sample(
    model: DiffusionModel,
    process: ReverseProcess,
    prompts: Sequence[str],
    *,
    start_seeds: Sequence[int],
    step_seeds: Callable[[int], Sequence[int]],
    size: tuple[int, int] | None = None,
) -> Trajectories:
    """Sample one trajectory a prompt from the policy, or within `reference()` from the reference.

    A row depends on its prompt and its seeds, and on its neighbours in nothing but float rounding.

    Args:
        model: put in evaluation mode for the time being.
        process: checked against the model before.
        prompts: n of them, repeats are fine.
        start_seeds: n seeds of the start noise; images of equal seeds start from equal noise.
        step_seeds: from the index of a step, 0 to S - 1, to n seeds of its noise.
        size: (height, width) of the images in pixels; None is the network's own.
    """
    noising = model.noising
    assert isinstance(noising, AbstractVariancePreserving), "ReverseProcess.check comes first"
    shape = model.latent_space.shape(size)
    times = noising.reverse_times(process.steps)
    latents = [send(noise_from_seeds(start_seeds, shape), model.device)]
    log_likelihoods = []
    with model.sampling():
        denoise = model.denoiser(prompts, guidance=process.guidance, size=size)
        for index, (t, t_next) in enumerate(times):
            step = reverse_step(denoise, noising, latents[-1], t, t_next, eta=process.eta)
            outcome = step.arrive(send(noise_from_seeds(step_seeds(index), shape), model.device))
            log_likelihoods.append(transition_log_likelihood(outcome, step.mean, step.std))
            latents.append(outcome)
    return Trajectories(
        latents=torch.stack(latents).cpu(),
        log_likelihoods=torch.stack(log_likelihoods).cpu(),
        times=tuple(times),
    )
