"""What a likelihood promises: batch and model in, one number per row and view out."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from diffalign.models.base import AbstractModel
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.objectives.base import Measure, Measured, TokenLikelihoods
from diffalign.ranges import Ranged
from diffalign.timesteps import TimestepSampling

Model = TypeVar("Model")
Batch = TypeVar("Batch")
Prepared = TypeVar("Prepared")


@dataclass(frozen=True, kw_only=True)
class AbstractLikelihood(Ranged, abc.ABC, Generic[Model, Batch, Prepared]):
    """Log-likelihood of samples, exact or surrogate; its fields are the settings of a config.

    The type parameters are a loaded model, a batch, and what `prepare` makes of both.
    `check` sees to it that the model is such a one, and `batch_type` that the batch is.
    """

    batch_type: ClassVar[type]
    """The same as `Batch`, for whoever puts source and likelihood together."""
    measures: ClassVar[Measure]
    """What its numbers are; objectives say which of these they read."""
    takes_encodings: ClassVar[bool] = False
    """Whether it can do with what encoders made of images and prompts in advance."""
    needs_captions: ClassVar[bool] = False
    """Whether it cannot measure an image whose caption was dropped."""

    @abc.abstractmethod
    def check(self, model: AbstractModel) -> None:
        """Raise ValueError if this cannot measure what `model` makes, before any weight is read."""

    def data_views(self, views: frozenset[str]) -> frozenset[str]:
        """The views that a source must read for `views` to be measured: those themselves, unless
        part of them is made here.

        Raises:
            ValueError: a view asks for what cannot be made.
        """
        return views

    @property
    def gives_divergence(self) -> bool:
        """Whether `row_metadata` has a `divergence`, for objectives that need one."""
        return False

    @property
    def gives_measured(self) -> frozenset[Measured]:
        """Which further fields of `Likelihoods` there are, for objectives that need them: from
        `row_metadata`, or `tokens` from `token_likelihoods`."""
        return frozenset()

    @property
    def least_samples(self) -> int:
        """How many samples a micro-batch must have, where they are measured next to each other."""
        return 1

    @property
    def walks(self) -> bool:
        """Whether `prepare` runs the network, as often as its batch asks for."""
        return False

    @property
    def runs_reference(self) -> bool:
        """Whether it is the reference that `prepare` runs."""
        return False

    @property
    def weighs_rows(self) -> bool:
        """Whether `row_metadata` has a `weight` for pairs of images."""
        return False

    @property
    def replaced_strength(self) -> frozenset[str]:
        """Parts of a pair's strength that it says itself, in place of the data."""
        return frozenset()

    rounds_below: ClassVar[float] = 0.0
    """Magnitude of its numbers below which the error of rounding is no longer a share of them."""

    def timestep_sampling(self) -> TimestepSampling:
        """Which noise levels image pairs are to be seen at."""
        return TimestepSampling()

    def reverse_process(self) -> ReverseProcess | None:
        """How the reverse steps that it measures are taken; None where it measures none."""
        return None

    @abc.abstractmethod
    def prepare(self, model: Model, batch: Batch) -> Prepared:
        """Do, without gradient, what policy and reference share: encode, noise, embed.

        Called once per batch; its result goes to `evaluate`, for the reference and for the policy.
        """

    @abc.abstractmethod
    def evaluate(self, model: Model, prepared: Prepared) -> Mapping[str, Tensor]:
        """Log-likelihood of every row under the model as it is: {view: float32 [n]}.

        Nothing is sampled here: policy and reference see the same sample.
        """

    def row_metadata(self, prepared: Prepared) -> Mapping[str, Mapping[str, Tensor]]:
        """What else is known of the rows of a view, the same for policy and reference: fields of
        `Likelihoods` by name, such as `weight` or `length`, each of shape [n]."""
        return {}

    def token_likelihoods(self, prepared: Prepared) -> Mapping[str, TokenLikelihoods]:
        """Each token of the rows of a view, by the evaluations that there were; none of a view, or
        of any, where that is not asked for."""
        return {}

    def noise(self, model: Model, batch: Batch) -> Tensor | None:
        """How much noise each sample is seen through: the share of the model's schedule, [n] in [0,
        1] on the CPU; None where there is none."""
        return None

    def figures(self, prepared: Prepared) -> Mapping[str, Tensor]:
        """What the log should say of the policy's last evaluation, detached: [n] or a scalar."""
        return {}

    def check_known_in_advance(self, views: frozenset[str]) -> None:
        """Raise ValueError unless the reference's values of these views are the same at every visit
        of a sample with the same sample, and are all that an objective asks of it."""
        raise ValueError(f"{type(self).__name__} samples something new at every visit of a sample")

    def defining_settings(self) -> Mapping[str, Any]:
        """The settings that change its numbers, and not only how they are computed."""
        return {}

    @abc.abstractmethod
    def describe(self) -> str:
        """One line for the start of a run: what is measured, and in which unit."""

    def note(self, model: AbstractModel) -> str:
        """How it sends samples through a model, where that depends on both; empty where nothing
        is to be said, or nothing is known of the model yet."""
        return ""

    def published_scale(self, beta: float) -> str:
        """What `beta` on this likelihood's unit is called in published code; may be empty."""
        return ""
