"""AdamW, fused.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffalign.training.optimizers.base import AbstractAdam, Parameters

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class AdamW(AbstractAdam):
    """AdamW of torch, fused: eight bytes of moments a trained parameter."""

    shards: ClassVar[bool] = True

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(parameters, fused=True, **self.adam)
