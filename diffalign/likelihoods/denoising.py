"""How well a denoiser predicts what was mixed into an image: a surrogate for its log-likelihood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.data.batches import ImageBatch
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.models.base import AbstractModel
from diffalign.models.devices import send
from diffalign.models.diffusion.conditioning import Framing
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.noising import StraightPath
from diffalign.objectives.base import Measure
from diffalign.seeding import TimestepSampling, noise_from_seeds
from diffalign.shapes import check_same_shape


def denoising_log_likelihood(prediction: Tensor, target: Tensor) -> Tensor:
    """Surrogate for log p(image | prompt) at one noise level: minus half the mean squared error.

    The number of pixels, the number of timesteps and the timestep weight are all absorbed by beta;
    on this scale the launchers of DiffusionDPO set beta to 5000.

    Args:
        prediction: network output, shape [B, ...], any float type.
        target: what it was asked to predict (noise, velocity, flow), same shape.

    Returns:
        Shape [B], float32 (float64 for float64 inputs): policy and reference differ by less than
        half precision can hold.

    Raises:
        ValueError: the shapes differ; broadcasting would hide it.

    Source: Wallace et al. 2023, arXiv:2311.12908; their train.py folds the half into scale_term.
    """
    check_same_shape(prediction=prediction, target=target)
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    error = (prediction.to(dtype) - target.to(dtype)).square()
    return -0.5 * error.flatten(start_dim=1).mean(dim=1)


@dataclass(frozen=True, kw_only=True)
class NoisyViews:
    """V views of B samples as V * B rows, corrupted; the rows of a view are consecutive."""

    views: tuple[str, ...]
    noisy: Tensor
    """Shape [V * B, channels, h, w], float32."""
    target: Tensor
    """What the network should predict, same shape."""
    time: Tensor
    """As the network takes it, shape [V * B]."""
    conditioning: Mapping[str, Any]
    """What else the network is told."""


@dataclass(frozen=True, kw_only=True)
class Denoising(AbstractLikelihood[DiffusionModel, ImageBatch, NoisyViews]):
    """Minus half the denoising error at the time and noise that the batch carries."""

    batch_type: ClassVar[type] = ImageBatch
    measures: ClassVar[Measure] = "denoising error"

    timesteps: TimestepSampling = field(default_factory=TimestepSampling)
    """Which times the loader samples."""

    def check(self, model: AbstractModel) -> None:
        if not isinstance(model, AbstractDiffusion):
            raise ValueError("denoising measures images under a diffusion model, such as sdxl")
        noising = model.noising()
        self.timesteps.check(noising.schedule_length)
        if self.timesteps.moves and not isinstance(noising, StraightPath):
            raise ValueError(
                "timesteps are shifted, which only those of a straight path can be (SD3 and other "
                "FlowMatch models), and this model has a beta schedule: leave shift out"
            )

    def timestep_sampling(self) -> TimestepSampling:
        return self.timesteps

    @torch.no_grad()
    def prepare(self, model: DiffusionModel, batch: ImageBatch) -> NoisyViews:
        """Encode and corrupt all views; the views of a sample share time, noise and prompt."""
        views = tuple(batch.images)
        images = torch.cat([batch.images[view] for view in views])
        seeds = [seed for view in views for seed in batch.encoding_seeds[view]]
        clean = model.autoencoder.encode(images, seeds)
        one_view = noise_from_seeds(batch.noise_seeds, tuple(clean.shape[1:]))
        noise = send(one_view, clean.device).repeat(len(views), 1, 1, 1)
        t = batch.timesteps.repeat(len(views))
        framing = Framing(
            original_sizes=torch.cat([batch.original_sizes[view] for view in views]),
            crop_corners=torch.cat([batch.crop_corners[view] for view in views]),
            target_size=(images.shape[-2], images.shape[-1]),
        )
        return NoisyViews(
            views=views,
            noisy=model.noising.corrupt(clean, noise, t),
            target=model.noising.target(clean, noise, t),
            time=send(model.noising.network_time(t), clean.device),
            conditioning=model.prompts.framed(batch.prompts * len(views), framing),
        )

    def evaluate(self, model: DiffusionModel, prepared: NoisyViews) -> dict[str, Tensor]:
        prediction = model.predict(prepared.noisy, prepared.time, prepared.conditioning)
        rows = denoising_log_likelihood(prediction, prepared.target)
        return dict(zip(prepared.views, rows.chunk(len(prepared.views)), strict=True))

    def published_scale(self, beta: float) -> str:
        """Beta in the units of published code, for the start of a run."""
        return f" (Salesforce beta_dpo {beta:g}, diffusers SD1.5 script beta_dpo {beta / 2:g})"

    def describe(self) -> str:
        """One line for the start of a run."""
        return "minus half the mean squared denoising error"
