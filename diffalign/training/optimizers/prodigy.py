"""Prodigy, which finds the size of its steps while it trains.

Source: Mishchenko and Defazio 2023, arXiv:2306.06101; prodigyopt, by the first author.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from diffalign.ranges import AtLeast, Between, MoreThan
from diffalign.training.optimizers.base import AbstractAdam, Parameters

if TYPE_CHECKING:
    import torch

_A_FACTOR = (
    "prodigy finds the size of its steps itself and multiplies it by lr: leave it at 1, and change "
    "d_coef for larger or smaller steps"
)


@dataclass(frozen=True, kw_only=True)
class Prodigy(AbstractAdam):
    """AdamW whose step size is estimated from the distance to the start. It keeps four values a
    trained parameter, and waits for the device twice a tensor and step."""

    package: ClassVar[str] = "prodigyopt"
    extra: ClassVar[str] = "prodigy"
    takes_own_rates: ClassVar[bool] = False

    lr: Annotated[float, Between(0.1, 10, _A_FACTOR)] = 1.0
    """Factor of the step size that it finds, which the schedule changes; 1 is the authors'."""
    d_coef: Annotated[float, MoreThan(0)] = 1.0
    """Factor of the estimate itself: 0.5 or 2 where steps come out too large or too small."""
    slice_p: Annotated[int, AtLeast(1)] = 1
    """The estimate looks at every n-th value alone: 11 leaves an eleventh of the two values that it
    keeps besides AdamW's moments."""

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        from prodigyopt import Prodigy as Implementation

        return Implementation(
            parameters,
            d_coef=self.d_coef,
            slice_p=self.slice_p,
            safeguard_warmup=self.warmup_steps > 0,  # else small rates inflate the estimate
            **self.adam,
        )

    def figures(self, optimizer: torch.optim.Optimizer) -> Mapping[str, float]:
        """The step size that it has found so far."""
        return {"optimizer/step_size": float(optimizer.param_groups[0]["d"])}
