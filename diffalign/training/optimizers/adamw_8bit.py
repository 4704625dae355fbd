"""AdamW with moments of 8 bits.

Source: Dettmers et al. 2022, arXiv:2110.02861; bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from diffalign.training.optimizers.base import AbstractAdam, Parameters

if TYPE_CHECKING:
    import torch

_FEWEST, _BLOCK = 4096, 256
"""Values of a tensor whose moments are kept in 8 bits, and of a block that has one scale."""


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(AbstractAdam):
    """AdamW of bitsandbytes: two bytes of moments a trained parameter, and eight for tensors of
    fewer than 4096 values, which keep theirs in float32."""

    package: ClassVar[str] = "bitsandbytes"
    extra: ClassVar[str] = "bitsandbytes"

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit as Implementation

        return Implementation(parameters, **self.adam)

    def blank(self, parameters: Parameters) -> torch.optim.Optimizer:
        import torch

        class Moments(torch.optim.Optimizer):
            """Both moments of every parameter, in 8 bits by blocks of 256 with a float32 each."""

            def step(self, closure: Any = None) -> None:  # type: ignore[override]
                trained = [p for group in self.param_groups for p in group["params"]]
                for parameter in (p for p in trained if p not in self.state):
                    values = parameter.numel()
                    sizes = {torch.float32: values}
                    if values >= _FEWEST:
                        sizes = {torch.uint8: values, torch.float32: -(-values // _BLOCK)}
                    for name in ("first", "second"):
                        self.state[parameter] |= {
                            f"{name} {dtype}": torch.empty(n, dtype=dtype, device=parameter.device)
                            for dtype, n in sizes.items()
                        }

        return Moments(parameters, {"lr": self.lr})
