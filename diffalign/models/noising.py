"""How a clean latent is corrupted at time t, and what the network then has to predict.

Times come in units of training timesteps, float64 of shape [B] in [0, schedule_length), as
`ImageBatch.timesteps` holds them. Discrete schedules take the integer part, the straight path
divides by the length.

Sources: Ho et al. 2020, arXiv:2006.11239, eq. 4 (epsilon); Salimans and Ho 2022, arXiv:2202.00512,
appendix D (velocity); Liu et al. 2022, arXiv:2209.03003, eq. 1 (straight path).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor

from diffalign.errors import ModelError
from diffalign.models.placement import send
from diffalign.shapes import check_same_shape, expand_like


@dataclass(frozen=True, kw_only=True, eq=False)
class AbstractNoising(abc.ABC):
    """How a clean latent is corrupted at time t, and what the network then has to predict.

    Of training alone: samplers take their steps and spacing from the model's own scheduler.
    """

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


@dataclass(frozen=True, kw_only=True, eq=False)
class AbstractVariancePreserving(AbstractNoising):
    """A discrete schedule: the squared shares of image and noise sum to one."""

    alphas_cumprod: Tensor
    """Squared share of the image at each timestep, shape [schedule_length], float64."""

    def _shares(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of image and noise, each of shape [B, 1, ..., 1] and as `like` otherwise."""
        alphas_cumprod = self.alphas_cumprod.to(t.device)[t.long()]
        return (
            _factor(alphas_cumprod.sqrt(), like),
            _factor((1.0 - alphas_cumprod).sqrt(), like),
        )

    def network_time(self, t: Tensor) -> Tensor:
        return t.long()

    def corrupt(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        check_same_shape(clean=clean, noise=noise)
        alpha, sigma = self._shares(t, clean)
        return alpha * clean + sigma * noise


@dataclass(frozen=True, kw_only=True, eq=False)
class Epsilon(AbstractVariancePreserving):
    """The network predicts the noise (SD 1.5, SDXL)."""

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        check_same_shape(clean=clean, noise=noise)
        return noise


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


@dataclass(frozen=True, kw_only=True, eq=False)
class StraightPath(AbstractNoising):
    """Rectified flow (SD3): a straight line from the image at time 0 to noise at the end."""

    def network_time(self, t: Tensor) -> Tensor:
        return t.float()

    def corrupt(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        check_same_shape(clean=clean, noise=noise)
        share = _factor(t / self.schedule_length, clean)
        return (1.0 - share) * clean + share * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        check_same_shape(clean=clean, noise=noise)
        return noise - clean


def _factor(values: Tensor, like: Tensor) -> Tensor:
    return expand_like(send(values.to(like.dtype), like.device), like)


_SCHEDULE_FIELDS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


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
    scheduler = str(config.get("_class_name", "a scheduler without _class_name"))
    if scheduler.startswith("FlowMatch"):
        length = int(config.get("num_train_timesteps", 1000))
        return StraightPath(schedule_length=length)
    if scheduler.startswith("EDM"):
        raise ModelError(
            f"scheduler_config.json is of {scheduler}, whose preconditioning is not supported "
            f"(supported: epsilon and v_prediction on a beta schedule, FlowMatch schedulers)"
        )
    kinds = {"epsilon": Epsilon, "v_prediction": Velocity}
    named = prediction_type or config.get("prediction_type", "epsilon")
    if named not in kinds:
        raise ModelError(
            f"scheduler_config.json of {scheduler} has prediction_type {named!r} "
            f"(supported: {', '.join(kinds)})"
        )
    schedule: Any = DDPMScheduler(**{key: config[key] for key in _SCHEDULE_FIELDS if key in config})
    return kinds[named](
        schedule_length=len(schedule.alphas_cumprod),
        alphas_cumprod=schedule.alphas_cumprod.double(),
    )
