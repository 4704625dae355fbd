"""From noise to latents: one sampler for every backbone, around a plain denoising callable.

The steps are those of a scheduler of diffusers; what a network is told of prompt and size is in the
callable, and so is guidance. Steps with a density, which a preference can raise, are in
`reverse.py`, around the same callable.

Source: Ho and Salimans 2022, arXiv:2207.12598 (guidance, in the scale of diffusers: 1 is none);
Meng et al. 2022, arXiv:2210.03142 (networks that are told the guidance).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from diffalign.models.devices import freeze
from diffalign.models.diffusion.autoencoder import Autoencoder, LatentSpace
from diffalign.models.diffusion.conditioning import AbstractConditioner, PromptEncoder

Denoise = Callable[[Tensor, Tensor], Tensor]
"""From n latents [n, channels, h, w] and the times [n] that a network takes them at, to what it
predicts of them, of the same shape."""


class Samplable(Protocol):
    """A loaded model as far as sampling asks for it: one in training, or `SampledModel`."""

    @property
    def autoencoder(self) -> Autoencoder:
        """Between latents and images."""
        ...

    @property
    def latent_space(self) -> LatentSpace:
        """Of what shape latents are."""
        ...

    @property
    def latent_dtype(self) -> torch.dtype:
        """In which latents are sampled."""
        ...

    def denoiser(
        self,
        prompts: Sequence[str],
        *,
        guidance: float,
        size: tuple[int, int] | None = None,
        negative_prompt: str | None = None,
    ) -> Denoise:
        """The network with n prompts, each of which is encoded alone.

        Args:
            prompts: n of them.
            guidance: scale of classifier-free guidance; 1 or less is none.
            size: (height, width) of the images in pixels, told as that of the uncropped file; None
                is the network's own.
            negative_prompt: what guidance steers away from; None is the backbone's own choice.
        """
        ...


def with_guidance(denoise: Denoise, guidance: float) -> Denoise:
    """Classifier-free guidance: carry each prediction from the unconditional one on through the
    conditional one, by one call for both.

    Args:
        denoise: takes 2 n rows, of which it is told the first n unconditionally.
        guidance: 1 or less is none: `denoise` as it is, which then takes n rows.
    """
    if guidance <= 1:
        return denoise

    def guided(noisy: Tensor, time: Tensor) -> Tensor:
        both = denoise(torch.cat([noisy, noisy]), torch.cat([time, time]))
        unconditional, conditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return guided


def sample(
    denoise: Denoise,
    noise: Tensor,
    scheduler: Any,
    *,
    steps: int,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    schedule: Mapping[str, Any] | None = None,
) -> Tensor:
    """Take a scheduler's steps from noise to latents.

    Args:
        denoise: predicts what the scheduler was configured for.
        noise: standard normal, [n, channels, h, w]; device and dtype are kept.
        scheduler: of diffusers; its state is started anew.
        steps: as `set_timesteps` counts them.
        eta: share of the noise of DDPM's posterior, for schedulers that take one (DDIM).
        generators: n of them, for schedulers that add noise at each step.
        schedule: what else `set_timesteps` is given, such as `mu` of a dynamic shift.

    Returns:
        Scaled latents, shape as `noise`.
    """
    scheduler.set_timesteps(steps, device=noise.device, **(schedule or {}))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    taken = inspect.signature(scheduler.step).parameters
    offered = {"eta": eta, "generator": None if generators is None else list(generators)}
    options = {name: value for name, value in offered.items() if name in taken}
    # Flow-matching schedulers neither scale the noise nor what the network is given.
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda states, _: states)
    for time in scheduler.timesteps:
        prediction = denoise(scale(latents, time), time.expand(len(latents)))
        latents = scheduler.step(prediction, time, latents, **options, return_dict=False)[0]
    return latents


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledModel:
    """A loaded model that is only sampled from, with all parts in the precision of sampling."""

    network: Any
    """The denoiser, on its device and in its dtype."""
    autoencoder: Autoencoder
    prompts: PromptEncoder
    latent_space: LatentSpace

    @classmethod
    def of(
        cls,
        pipeline: Any,
        *,
        component: str,
        text_encoders: Sequence[str],
        conditioner: AbstractConditioner,
        latent_space: LatentSpace,
        device: torch.device,
        dtype: torch.dtype,
    ) -> SampledModel:
        """Freeze a pipeline's parts on their device.

        Args:
            pipeline: of diffusers, in float32.
            component: name of its network.
            text_encoders: names of those that are there.
            conditioner: around them.
            latent_space: of the network.
            device: where all goes.
            dtype: of all weights; the autoencoder stays in float32 where float16 breaks it.
        """
        parts = pipeline.components
        upcast = dtype == torch.float16 and parts["vae"].config.force_upcast
        freeze(parts["vae"], device, torch.float32 if upcast else dtype)
        for name in (component, *text_encoders):
            freeze(parts[name], device, dtype)
        return cls(
            network=parts[component],
            # How many images are made at once is said by whoever samples.
            autoencoder=Autoencoder(parts["vae"], images_at_once=2**31),
            prompts=PromptEncoder(conditioner, device=device, capacity=32),
            latent_space=latent_space,
        )

    @property
    def latent_dtype(self) -> torch.dtype:
        """That of the network, as in the backbone's own pipeline."""
        dtype: torch.dtype = self.network.dtype
        return dtype

    @torch.no_grad()
    def denoiser(
        self,
        prompts: Sequence[str],
        *,
        guidance: float,
        size: tuple[int, int] | None = None,
        negative_prompt: str | None = None,
    ) -> Denoise:
        """See `Samplable`. A network that was distilled to be told the guidance is told it."""
        width = self.network.config.get("time_cond_proj_dim")
        dtype = self.latent_dtype  # of diffusers, which looks through all weights for it
        conditioning = self.prompts.guided(
            prompts,
            guidance=guidance if width is None else 1.0,
            size=size or self.latent_space.image_size,
            negative_prompt=negative_prompt,
        )
        if width is not None:
            told = guidance_embedding(guidance, width).to(self.network.device, dtype)
            conditioning = {**conditioning, "timestep_cond": told.expand(len(prompts), -1)}

        def denoise(noisy: Tensor, time: Tensor) -> Tensor:
            prediction: Tensor = self.network(
                noisy.to(dtype), timestep=time, return_dict=False, **conditioning
            )[0]
            return prediction

        return denoise if width is not None else with_guidance(denoise, guidance)


def guidance_embedding(guidance: float, width: int) -> Tensor:
    """The guidance scale as a network hears of it that was distilled to be told it, float32
    [1, width]: sines, then cosines, of the scale above 1 in thousandths (arXiv:2210.03142)."""
    scale = torch.tensor([(guidance - 1.0) * 1000.0])
    return get_timestep_embedding(scale, width, flip_sin_to_cos=False, downscale_freq_shift=1)
