"""Schedule-free AdamW: an average of the weights takes the place of a falling learning rate.

The network trains at y, between the average x and the sequence z that AdamW's steps move; x is what
the run is worth at every moment, and what it exports, evaluates and previews.

Source: Defazio et al. 2024, arXiv:2405.15682; schedulefree, by its authors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffalign.training.optimizers.base import AbstractAdam, Parameters

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ScheduleFree(AbstractAdam):
    """Schedule-free AdamW: its learning rate stays after warm-up, and its result is an average.
    Online runs sample from the weights that train."""

    package: ClassVar[str] = "schedulefree"
    extra: ClassVar[str] = "schedulefree"
    averages: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule != "constant":
            raise ValueError(
                f"schedule is {self.schedule}, and schedule_free has its averaging in place of "
                f"one: set it to constant; warmup_steps is allowed"
            )
        if self.betas[0] == 0:
            raise ValueError("betas[0] must be above 0 for schedule_free, whose average needs it")

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(parameters, **self.adam)  # warm-up is the schedule's
        optimizer.train()
        return optimizer

    def averaged(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> list[Tensor]:
        """x, out of y = beta x + (1 - beta) z. The library's own `eval()` and `train()` change the
        weights in place, and not back to the same bits."""
        beta = self.betas[0]
        found = []
        for parameter in parameters:
            y = parameter.detach()
            z = optimizer.state.get(parameter, {}).get("z", y)  # before the first step they are one
            found.append(y.lerp(z.to(y.device), 1 - 1 / beta))
        return found
