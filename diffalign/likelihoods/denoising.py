"""How well a denoiser predicts what was mixed into an image: a surrogate for its log-likelihood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from diffalign.config import to_dict
from diffalign.data.batches import ImageBatch
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.models.base import AbstractModel
from diffalign.models.devices import send
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.noising import StraightPath
from diffalign.objectives.base import Measure
from diffalign.ranges import Between
from diffalign.seeding import noise_from_seeds
from diffalign.shapes import check_same_shape
from diffalign.timesteps import TimestepSampling


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
    error = _residual(prediction, target).square()
    return -0.5 * error.flatten(start_dim=1).mean(dim=1)


def _residual(prediction: Tensor, target: Tensor) -> Tensor:
    """Prediction minus target, same shape, in at least float32."""
    check_same_shape(prediction=prediction, target=target)
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return prediction.to(dtype) - target.to(dtype)


def rejected_share(chosen_error: Tensor, overlap: Tensor, *, mu: float) -> Tensor:
    """Share of the rejected side's gradient at which a step still lowers the chosen side's error.

    To first order, and in the space of predictions. With g the gradients of the two sides' mean
    errors it is (1 - mu) |g_chosen|^2 / <g_chosen, g_rejected>, at most 1, and 1 where the two do
    not point the same way. What the loss multiplies them by does not enter.

    Args:
        chosen_error: mean squared error of the chosen rows, shape [B].
        overlap: mean product of both sides' residuals, shape [B].
        mu: how much of that room is left unused, 0 to 1.

    Returns:
        A scalar from 0 to 1, without gradient: one for all rows, whatever their timesteps.

    Source: Fu et al. 2025, arXiv:2511.03317, as in AIDC-AI/Diffusion-SDPO. Its 1e-9 in the
    denominator is left out: it is absolute, next to products of gradients that shrink with the
    square of the number of elements, and takes 15 % off for late timesteps and large batches.
    """
    own, shared = chosen_error.detach().mean(), overlap.detach().mean()
    return torch.where(shared > 0, ((1 - mu) * own / shared).clamp(0, 1), 1.0)


@dataclass(kw_only=True)
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
    overlap: Tensor | None = None
    """Of chosen and rejected residuals, [B], once the policy was evaluated with gradient."""
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    """For the log, from then on."""


@dataclass(frozen=True, kw_only=True)
class Denoising(AbstractLikelihood[DiffusionModel, ImageBatch, NoisyViews]):
    """Minus half the denoising error at the time and noise that the batch carries."""

    batch_type: ClassVar[type] = ImageBatch
    measures: ClassVar[Measure] = "denoising error"
    takes_encodings: ClassVar[bool] = True

    timesteps: TimestepSampling = field(default_factory=TimestepSampling)
    """Which times the loader samples."""
    safeguard: Annotated[float, Between(0, 1)] | None = None
    """Scale the rejected side's gradient down where it would raise the chosen side's error: mu of
    Diffusion-SDPO, 0.9 there; null leaves it. Values do not change. There is one scale for each
    micro-batch of each device, logged as `safeguard_lambda`: it mixes timesteps, and depends on
    training.samples_per_device, but on neither accumulation nor processes."""

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

    def data_views(self, views: frozenset[str]) -> frozenset[str]:
        """The views themselves.

        Raises:
            ValueError: there is a safeguard, and no pair for it.
        """
        if self.safeguard is not None and not views >= {"chosen", "rejected"}:
            raise ValueError(
                f"safeguard is {self.safeguard:g}, and the objective does not compare chosen with "
                f"rejected images (it reads {', '.join(sorted(views))}): set safeguard to null"
            )
        return views

    def check_known_in_advance(self, views: frozenset[str]) -> None:
        """Two numbers a pair, its two errors, are all that an objective asks of a reference."""

    def defining_settings(self) -> Mapping[str, Any]:
        times = to_dict(self.timesteps)
        return {f"timesteps.{name}": value for name, value in times.items()}

    def noise(self, model: DiffusionModel, batch: ImageBatch) -> Tensor:
        return batch.timesteps / model.noising.schedule_length

    @torch.no_grad()
    def prepare(self, model: DiffusionModel, batch: ImageBatch) -> NoisyViews:
        """Encode and corrupt all views; the views of a sample share time, noise and prompt."""
        views = batch.views
        clean = model.latents(batch)
        one_view = noise_from_seeds(batch.noise_seeds, tuple(clean.shape[1:]))
        noise = send(one_view, clean.device).repeat(len(views), 1, 1, 1)
        t = batch.timesteps.repeat(len(views))
        return NoisyViews(
            views=views,
            noisy=model.noising.corrupt(clean, noise, t),
            target=model.noising.target(clean, noise, t),
            time=send(model.noising.network_time(t), clean.device),
            conditioning=model.conditioning(batch),
        )

    def evaluate(self, model: DiffusionModel, prepared: NoisyViews) -> dict[str, Tensor]:
        prediction = model.predict(prepared.noisy, prepared.time, prepared.conditioning)
        rows = denoising_log_likelihood(prediction, prepared.target)
        views = dict(zip(prepared.views, rows.chunk(len(prepared.views)), strict=True))
        if torch.is_grad_enabled() and {"chosen", "rejected"} <= views.keys():
            self._compare_sides(views, prediction.detach(), prepared)
            if self.safeguard is not None:
                views["rejected"] = self._guarded(views, prepared, self.safeguard)
        return views

    def _compare_sides(
        self, views: Mapping[str, Tensor], prediction: Tensor, prepared: NoisyViews
    ) -> None:
        """Keep how far both sides' residuals point the same way."""
        residuals = _residual(prediction, prepared.target).chunk(len(prepared.views))
        of = dict(zip(prepared.views, residuals, strict=True))
        overlap = (of["chosen"] * of["rejected"]).flatten(start_dim=1).mean(dim=1)
        norms = (4 * views["chosen"].detach() * views["rejected"].detach()).sqrt()
        smallest = torch.finfo(norms.dtype).tiny
        prepared.overlap = overlap
        prepared.figures = {"cosine_of_sides": overlap / norms.clamp(min=smallest)}

    def _guarded(self, views: Mapping[str, Tensor], prepared: NoisyViews, mu: float) -> Tensor:
        """The rejected rows as they are, with a share of their gradient."""
        assert prepared.overlap is not None, "the sides were compared"
        share = rejected_share(-2 * views["chosen"].detach(), prepared.overlap, mu=mu)
        prepared.figures = {**prepared.figures, "safeguard_lambda": share}
        rejected = views["rejected"]
        return rejected.detach() + share * (rejected - rejected.detach())

    def row_metadata(self, prepared: NoisyViews) -> Mapping[str, Mapping[str, Tensor]]:
        if prepared.overlap is None:
            return {}
        return {side: {"overlap": prepared.overlap} for side in ("chosen", "rejected")}

    def figures(self, prepared: NoisyViews) -> Mapping[str, Tensor]:
        return prepared.figures

    def published_scale(self, beta: float) -> str:
        """Beta in the units of published code, for the start of a run."""
        return f" (Salesforce beta_dpo {beta:g}, diffusers SD1.5 script beta_dpo {beta / 2:g})"

    def describe(self) -> str:
        """One line for the start of a run."""
        said = "minus half the mean squared denoising error"
        if self.safeguard is None:
            return said
        return f"{said}; the rejected side's gradient is held back (safeguard {self.safeguard:g})"
