"""What a likelihood promises: batch and model in, one number per row and view out."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffalign.models.base import AbstractModel
from diffalign.objectives.base import Measure


@dataclass(frozen=True, kw_only=True)
class AbstractLikelihood(abc.ABC):
    """Log-likelihood of samples, exact or surrogate; its fields are the settings of a config."""

    batch_type: ClassVar[type]
    """What `prepare` takes."""
    measures: ClassVar[Measure]
    """What its numbers are; objectives say which of these they read."""

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

    @abc.abstractmethod
    def prepare(self, model: Any, batch: Any) -> Any:
        """Do, without gradient, what policy and reference share: encode, noise, embed.

        Called once per batch; its result goes to `evaluate`, for the reference and for the policy.
        """

    @abc.abstractmethod
    def evaluate(self, model: Any, prepared: Any) -> Mapping[str, Tensor]:
        """Log-likelihood of every row under the model as it is: {view: float32 [n]}.

        Nothing is sampled here: policy and reference see the same sample.
        """

    def row_metadata(self, prepared: Any) -> Mapping[str, Mapping[str, Tensor]]:
        """What else is known of the rows of a view, the same for policy and reference: fields of
        `Likelihoods` by name, such as `weight` or `length`, each of shape [n]."""
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

    def published_scale(self, beta: float) -> str:
        """What `beta` on this likelihood's unit is called in published code; may be empty."""
        return ""
