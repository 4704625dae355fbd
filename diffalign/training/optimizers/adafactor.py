"""Adafactor with a given learning rate, as the SDXL launcher of DiffusionDPO uses it.

Source: Shazeer and Stern 2018, arXiv:1804.04235; transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffalign.training.optimizers.base import AbstractOptimizer, Parameters

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Adafactor(AbstractOptimizer):
    """Adafactor of transformers without first moment: of a matrix's second moments it keeps the
    sums of rows and columns. Updates are clipped at a root mean square of 1."""

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor as Implementation

        return Implementation(
            parameters,
            lr=self.lr,
            weight_decay=self.weight_decay,
            clip_threshold=1.0,
            relative_step=False,
            scale_parameter=False,
        )
