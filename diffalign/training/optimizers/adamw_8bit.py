"""AdamW with moments of 8 bits.

Source: Dettmers et al. 2022, arXiv:2110.02861; bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffalign.training.optimizers.base import AbstractAdam, Parameters

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(AbstractAdam):
    """AdamW of bitsandbytes: two bytes of moments a trained parameter, and eight for tensors of
    fewer than 4096 values, which keep theirs in float32."""

    package: ClassVar[str] = "bitsandbytes"
    extra: ClassVar[str] = "bitsandbytes"

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit as Implementation

        return Implementation(parameters, **self.adam)
