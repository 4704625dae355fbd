"""How a clean latent is corrupted at time t, what the network then predicts, and the way back.

Times come in units of training timesteps, float64 of shape [B] in [0, schedule_length), as
`ImageBatch.timesteps` holds them. Discrete schedules take the integer part, the straight path
divides by the length.

Sources: Ho et al. 2020, arXiv:2006.11239, eq. 4 (epsilon); Salimans and Ho 2022, arXiv:2202.00512,
appendix D (velocity); Liu et al. 2022, arXiv:2209.03003, eq. 1 (straight path); Song et al. 2020,
arXiv:2010.02502, eqs. 12 and 16 (reverse step).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffalign.errors import ModelError
from diffalign.models.devices import send
from diffalign.models.diffusion.schedulers import (
    SCHEDULERS,
    alphas_cumprod,
    has_beta_schedule,
    with_defaults,
)
from diffalign.shapes import check_same_shape, expand_like


@dataclass(frozen=True, kw_only=True, eq=False)
class AbstractNoising(abc.ABC):
    """How a clean latent is corrupted at time t, and what the network then has to predict."""

    schedule_length: int
    """Number of training timesteps; times lie in [0, schedule_length)."""

    @abc.abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """The time as the network takes it, shape [B]."""

    @abc.abstractmethod
    def corrupt(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mix latents with noise.

        Args:
            clean: scaled latents, shape [B, ...].
            noise: standard normal, same shape.
            t: times, shape [B], on any device.

        Returns:
            The noisy latents, same shape, dtype and device as `clean`.
        """

    @abc.abstractmethod
    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is asked to predict from `corrupt(clean, noise, t)`, same shape."""

    @abc.abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """Logarithm of the ratio of the variances of image and noise at times [B], float64 [B]."""

    def variance_preserving(self) -> AbstractVariancePreserving:
        """The same process, whose way back from noise to an image is a chain of Gaussian steps.

        Raises:
            ValueError: its way back is none.
        """
        raise ValueError(
            "the reverse steps of a straight path are deterministic and have no density: "
            "take a model that predicts epsilon or v_prediction"
        )

    @abc.abstractmethod
    def separate(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The image and the noise of which, by the prediction, the noisy latent is made.

        Args:
            noisy: latents at `t`, shape [B, ...].
            prediction: of `target`, same shape; the result has the wider dtype of the two, and
                at least float32.
            t: times, shape [B], on any device.
        """

    def denoised(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latent that the network expects behind a noisy one: see `separate`."""
        return self.separate(noisy, prediction, t)[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class AbstractVariancePreserving(AbstractNoising):
    """A discrete schedule: the squared shares of image and noise sum to one.

    Its way back from noise to an image is a chain of Gaussian steps.
    """

    alphas_cumprod: Tensor
    """Squared share of the image at each timestep, shape [schedule_length], float64."""
    timestep_spacing: str = "leading"
    """How few reverse steps are spread over the schedule, in the words of diffusers: `leading`,
    `trailing` or `linspace`."""
    steps_offset: int = 0
    """Added to every time of `leading` spacing."""

    def variance_preserving(self) -> AbstractVariancePreserving:
        return self

    def _shares(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of image and noise, each of shape [B, 1, ..., 1] and as `like` otherwise."""
        alphas_cumprod = self.alphas_cumprod.to(t.device)[t.long()]
        return (
            _factor(alphas_cumprod.sqrt(), like),
            _factor((1.0 - alphas_cumprod).sqrt(), like),
        )

    def log_snr(self, t: Tensor) -> Tensor:
        kept = self.alphas_cumprod.to(t.device)[t.long()]
        return kept.log() - (1.0 - kept).log()

    def network_time(self, t: Tensor) -> Tensor:
        return t.long()

    def corrupt(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        check_same_shape(clean=clean, noise=noise)
        alpha, sigma = self._shares(t, clean)
        return alpha * clean + sigma * noise

    def reverse_times(self, steps: int) -> list[tuple[int, int]]:
        """Where each of `steps` reverse steps leaves from and arrives, from noise to image.

        Times are those of diffusers' DDIMScheduler. Each step arrives where the next one leaves
        from, and the last one at 0.
        """
        scheduler: Any = DDIMScheduler(
            num_train_timesteps=self.schedule_length,
            timestep_spacing=self.timestep_spacing,
            steps_offset=self.steps_offset,
        )
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.tolist()[:steps]  # rounding may add -1 to trailing spacing
        return list(zip(times, [*times[1:], 0], strict=True))

    def reverse_std(self, t: Tensor, t_next: Tensor, *, eta: float) -> Tensor:
        """Standard deviation of a reverse step, shape [B], float64 on the CPU.

        Args:
            t: times that steps leave from, int64 [B].
            t_next: times that they arrive at, int64 [B]; where equal to `t`, the result is 0.
            eta: share of the noise of DDPM's posterior, in [0, 1].
        """
        here, there = self._alphas_cumprod_at(t), self._alphas_cumprod_at(t_next)
        variance = (1.0 - there) / (1.0 - here) * (1.0 - here / there)
        return eta * variance.sqrt()

    def transition(
        self, noisy: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor, *, eta: float
    ) -> tuple[Tensor, Tensor]:
        """The Gaussian from which a reverse step samples the next, less noisy latent.

        Args:
            noisy: latents at `t`, shape [B, ...].
            prediction: of `target`, same shape.
            t: times that steps leave from, int64 [B]; on the CPU, or the device is waited for.
            t_next: times that they arrive at, int64 [B].
            eta: share of the noise of DDPM's posterior, in [0, 1]; 0 is deterministic.

        Returns:
            Mean, shape [B, ...], and standard deviation, shape [B], both in the wider dtype of
            `noisy` and `prediction`, and at least float32.
        """
        image, noise = self.separate(noisy, prediction, t)
        there, std = self._alphas_cumprod_at(t_next), self.reverse_std(t, t_next, eta=eta)
        kept_noise = (1.0 - there - std.square()).clamp(min=0.0)  # rounding may fall below 0
        mean = _factor(there.sqrt(), image) * image + _factor(kept_noise.sqrt(), image) * noise
        return mean, send(std.to(image.dtype), image.device)

    def _alphas_cumprod_at(self, t: Tensor) -> Tensor:
        return self.alphas_cumprod[t.cpu().long()]


@dataclass(frozen=True, kw_only=True, eq=False)
class Epsilon(AbstractVariancePreserving):
    """The network predicts the noise (SD 1.5, SDXL)."""

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        check_same_shape(clean=clean, noise=noise)
        return noise

    def separate(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        noisy, noise = _upcast(noisy, prediction)
        alpha, sigma = self._shares(t, noisy)
        return (noisy - sigma * noise) / alpha, noise


@dataclass(frozen=True, kw_only=True, eq=False)
class Velocity(AbstractVariancePreserving):
    """The network predicts alpha * noise - sigma * image (SD 2.1, zero-terminal-SNR models).

    At zero terminal SNR the last input holds no image at all, and this is the target that still
    says something there.
    """

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        check_same_shape(clean=clean, noise=noise)
        alpha, sigma = self._shares(t, clean)
        return alpha * noise - sigma * clean

    def separate(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        noisy, velocity = _upcast(noisy, prediction)
        alpha, sigma = self._shares(t, noisy)
        return alpha * noisy - sigma * velocity, sigma * noisy + alpha * velocity


@dataclass(frozen=True, kw_only=True, eq=False)
class StraightPath(AbstractNoising):
    """Rectified flow (SD3): a straight line from the image at time 0 to noise at the end."""

    def log_snr(self, t: Tensor) -> Tensor:
        share = t.double() / self.schedule_length
        return 2.0 * ((1.0 - share).log() - share.log())

    def network_time(self, t: Tensor) -> Tensor:
        return t.float()

    def corrupt(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        check_same_shape(clean=clean, noise=noise)
        share = _factor(t / self.schedule_length, clean)
        return (1.0 - share) * clean + share * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        check_same_shape(clean=clean, noise=noise)
        return noise - clean

    def separate(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        noisy, velocity = _upcast(noisy, prediction)
        share = _factor(t / self.schedule_length, noisy)
        return noisy - share * velocity, noisy + (1.0 - share) * velocity


def _factor(values: Tensor, like: Tensor) -> Tensor:
    return expand_like(send(values.to(like.dtype), like.device), like)


def _upcast(noisy: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    check_same_shape(noisy=noisy, prediction=prediction)
    dtype = torch.promote_types(torch.promote_types(noisy.dtype, prediction.dtype), torch.float32)
    return noisy.to(dtype), prediction.to(dtype)


_SPACINGS = ("leading", "linspace", "trailing")


def noising_from_scheduler(
    config: Mapping[str, Any], *, prediction_type: str | None = None
) -> AbstractNoising:
    """The noising that a model was trained with, from its own `scheduler_config.json`.

    Args:
        config: the content of that file, whichever scheduler class wrote it.
        prediction_type: overrides the one in the file.

    Raises:
        ModelError: a schedule or prediction type that is none of ours.
    """
    scheduler = config.get("_class_name")
    if str(scheduler).startswith("FlowMatch"):
        if prediction_type is not None:
            raise ModelError(f"prediction_type is {prediction_type}, and {scheduler} has none")
        return StraightPath(schedule_length=int(config.get("num_train_timesteps", 1000)))
    if str(scheduler).startswith("EDM"):
        raise ModelError(
            f"scheduler_config.json is of {scheduler}, whose preconditioning is not supported "
            f"(supported: epsilon and v_prediction on a beta schedule, FlowMatch schedulers)"
        )
    if not has_beta_schedule(config):
        raise ModelError(
            f"scheduler_config.json is of {scheduler}, which is not supported (supported: epsilon "
            f"and v_prediction on the beta schedule of {', '.join(SCHEDULERS)}; FlowMatch "
            f"schedulers)"
        )
    whole = with_defaults(config)
    kinds = {"epsilon": Epsilon, "v_prediction": Velocity}
    named = prediction_type or whole.get("prediction_type", "epsilon")
    if named not in kinds:
        raise ModelError(
            f"scheduler_config.json of {scheduler} has prediction_type {named!r} "
            f"(supported: {', '.join(kinds)})"
        )
    _refuse_other_meanings(whole)
    shares = alphas_cumprod(whole)
    return kinds[named](
        schedule_length=len(shares),
        alphas_cumprod=shares,
        timestep_spacing=whole.get("timestep_spacing", "leading"),
        steps_offset=whole.get("steps_offset", 0),
    )


def _refuse_other_meanings(config: Mapping[str, Any]) -> None:
    """Raise ModelError for fields under which times or predictions mean something else."""
    scheduler = config["_class_name"]
    if config.get("use_flow_sigmas"):
        raise ModelError(
            f"scheduler_config.json of {scheduler} has use_flow_sigmas, so the model follows a "
            f"straight path and not a beta schedule: only FlowMatch schedulers are read as such"
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise ModelError(
            f"scheduler_config.json of {scheduler} has timestep_type {config['timestep_type']!r}: "
            f"the model is told noise levels in place of timesteps, which is not supported"
        )
    if str(config.get("variance_type")).startswith("learned"):
        raise ModelError(
            f"scheduler_config.json of {scheduler} has variance_type {config['variance_type']!r}: "
            f"models that also predict a variance are not supported"
        )
    spacing, offset = config.get("timestep_spacing", "leading"), config.get("steps_offset", 0)
    if spacing not in _SPACINGS:
        raise ModelError(
            f"scheduler_config.json of {scheduler} has timestep_spacing {spacing!r} (supported: "
            f"{', '.join(_SPACINGS)})"
        )
    if not isinstance(offset, int) or offset < 0:
        raise ModelError(
            f"scheduler_config.json of {scheduler} has steps_offset {offset!r}: it must be a whole "
            f"number from 0"
        )
