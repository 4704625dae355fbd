"""How an image looks to a diffusion model half way: noised, and predicted clean in one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.models.devices import send
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.noising import AbstractVariancePreserving
from diffalign.seeding import noise_from_seeds


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
