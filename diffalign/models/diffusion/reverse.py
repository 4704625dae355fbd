"""The way from noise to an image in few steps, each of them a sample with a known density.

Sampling and the likelihood of what was sampled go through `reverse_step`, with one set of settings:
a ratio of two models under different guidance would compare nothing.

Source: Song et al. 2020, arXiv:2010.02502, eqs. 12 and 16, as stochastic as DDPM at eta 1; Ho and
Salimans 2022, arXiv:2207.12598 (guidance, in the scale of diffusers: 1 is none).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from diffalign.models.devices import send
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.noising import AbstractNoising, AbstractVariancePreserving
from diffalign.models.diffusion.sampling import Denoise
from diffalign.ranges import AtLeast, Between, Ranged
from diffalign.seeding import noise_from_seeds
from diffalign.shapes import expand_like


@dataclass(frozen=True, kw_only=True)
class ReverseProcess(Ranged):
    """How images are sampled, and with it what the density of a step is."""

    steps: Annotated[int, AtLeast(1)] = 20
    """Network evaluations from noise to image."""
    guidance: Annotated[float, AtLeast(1, "1 is none")] = 5.0
    """How far each prediction is carried from the unconditional through the conditional one; 1 is
    the conditional one itself, at half the cost."""
    eta: Annotated[float, Between(0, 1)] = 1.0
    """Share of the noise of DDPM's posterior that each step adds, in [0, 1]. At 0 steps are
    deterministic: good for images, but then they have no density to learn from."""

    def check_steps(self, noising: AbstractNoising) -> None:
        """Raise ValueError unless a model with this noising can take every step."""
        noising = noising.variance_preserving()
        if self.steps > noising.schedule_length:
            raise ValueError(
                f"steps is {self.steps}, but the model's schedule has {noising.schedule_length}"
            )
        pairs = noising.reverse_times(self.steps)
        first = pairs[0][0]
        if first >= noising.schedule_length:
            raise ValueError(
                f"{self.steps} steps with steps_offset {noising.steps_offset} start at timestep "
                f"{first}, but the model's schedule ends at {noising.schedule_length - 1}: "
                f"take fewer steps"
            )
        t = torch.tensor([leaving for leaving, _ in pairs])
        if not torch.isfinite(noising.denoised(torch.ones(len(t)), torch.ones(len(t)), t)).all():
            raise ValueError(
                f"timestep {first} holds no image at all (zero terminal signal-to-noise ratio), "
                f"and a prediction of epsilon says nothing about it: is prediction_type "
                f"v_prediction, or timestep_spacing leading?"
            )

    def check(self, noising: AbstractNoising) -> None:
        """Raise ValueError unless every step of a model with this noising has a density."""
        self.check_steps(noising)
        noising = noising.variance_preserving()
        if self.eta == 0:
            raise ValueError(
                "eta must be above 0, got 0.0: a step without noise has no density that a "
                "preference could raise; 1 is what is published"
            )
        pairs = noising.reverse_times(self.steps)
        t, t_next = torch.tensor(pairs).unbind(dim=1)
        still = (noising.reverse_std(t, t_next, eta=self.eta) == 0).nonzero()
        if len(still):
            step = int(still[0])
            raise ValueError(
                f"step {step + 1} of {self.steps} goes from timestep {pairs[step][0]} to "
                f"{pairs[step][1]} and adds no noise, so it has no density: in the model's "
                f"scheduler_config.json set steps_offset to 1 with timestep_spacing leading, as "
                f"Stable Diffusion does, or timestep_spacing to trailing (they are "
                f"{noising.steps_offset} and {noising.timestep_spacing})"
            )


@dataclass(frozen=True, kw_only=True)
class ReverseStep:
    """The Gaussians that n reverse steps sample from."""

    mean: Tensor
    """Of the next latents, float32 [n, channels, h, w]."""
    std: Tensor
    """Float32 [n]."""
    denoised: Tensor
    """The clean latents that the network expects, float32 [n, channels, h, w]."""

    def arrive(self, noise: Tensor) -> Tensor:
        """Where the steps end with this standard normal noise, of the shape of `mean`."""
        return self.mean + expand_like(self.std, noise) * noise

    def rows(self, index: Tensor) -> ReverseStep:
        """The steps at `index`, an int64 tensor [m] on the same device; repeats are fine."""
        return ReverseStep(
            mean=self.mean[index], std=self.std[index], denoised=self.denoised[index]
        )


def reverse_step(
    denoise: Denoise,
    noising: AbstractVariancePreserving,
    states: Tensor,
    t: int | Tensor,
    t_next: int | Tensor,
    *,
    eta: float,
) -> ReverseStep:
    """Where a model would step to, by one prediction; gradient flows through it.

    Args:
        denoise: predicts what `noising.target` asks for, under guidance or without.
        noising: of the model.
        states: latents to leave from, float32 [n, channels, h, w], on the model's device.
        t: timesteps of the states: one for all, or int64 [n] on the CPU.
        t_next: timesteps to arrive at, likewise.
        eta: share of the noise of DDPM's posterior, in [0, 1].
    """
    t, t_next = (torch.as_tensor(at).expand(len(states)) for at in (t, t_next))
    prediction = denoise(states, send(noising.network_time(t), states.device))
    mean, std = noising.transition(states, prediction, t, t_next, eta=eta)
    return ReverseStep(mean=mean, std=std, denoised=noising.denoised(states, prediction, t))


def through_one_step(
    model: DiffusionModel,
    images: Tensor,
    prompts: Sequence[str],
    t: Tensor,
    *,
    noise_seeds: Sequence[int],
    encoding_seeds: Sequence[int],
    guidance: float,
) -> Tensor:
    """Encode images, mix in the noise of time t, predict the image behind it, and decode that.

    What a step-aware preference model is trained on and scores (arXiv:2406.04314, section 4.2).

    Args:
        model: whose network, noise schedule and autoencoder are used; without gradient.
        images: shape [n, 3, H, W], float32 in [-1, 1].
        prompts: n of them.
        t: timesteps, shape [n].
        noise_seeds: n seeds of the mixed-in noise; equal ones share it.
        encoding_seeds: n seeds with which the autoencoder's posterior is sampled.
        guidance: scale of classifier-free guidance of the prediction.

    Returns:
        Shape [n, 3, H, W], float32 in [-1, 1].
    """
    noising = model.noising
    assert isinstance(noising, AbstractVariancePreserving), "checked with the config"
    size = (images.shape[-2], images.shape[-1])
    with torch.no_grad(), model.sampling():
        clean = model.autoencoder.encode(images, encoding_seeds)
        noise = send(noise_from_seeds(noise_seeds, tuple(clean.shape[1:])), clean.device)
        noisy = noising.corrupt(clean, noise, t)
        time = send(noising.network_time(t), clean.device)
        denoise = model.denoiser(prompts, guidance=guidance, size=size)
        return model.autoencoder.decode(noising.denoised(noisy, denoise(noisy, time), t))
