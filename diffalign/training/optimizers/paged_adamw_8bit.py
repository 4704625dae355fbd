"""AdamW with moments of 8 bits that move to main memory when the GPU's is full.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffalign.errors import ConfigError
from diffalign.training.optimizers.base import AbstractAdam, Parameters

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class PagedAdamW8bit(AbstractAdam):
    """AdamW of bitsandbytes with 8-bit moments in pages that leave the GPU where its memory is
    short. A run that was resumed holds those that it read unpaged."""

    package: ClassVar[str] = "bitsandbytes"
    extra: ClassVar[str] = "bitsandbytes"

    def check(self) -> None:
        import torch

        super().check()
        if not torch.cuda.is_available():
            raise ConfigError(
                "optimizer.kind paged_adamw_8bit pages between the memory of a CUDA device and "
                "main memory, and this machine has no such device: set optimizer.kind=adamw_8bit"
            )

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        from bitsandbytes.optim import PagedAdamW8bit as Implementation

        return Implementation(parameters, **self.adam)

    def blank(self, parameters: Parameters) -> torch.optim.Optimizer:
        """Nothing: all of its pages may leave the device."""
        import torch

        return torch.optim.SGD(parameters, lr=self.lr)
