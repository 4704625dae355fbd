"""In which precision the language model of a vision-language model runs between its products.

Autocast rounds the factors of matrix products and nothing else: with embeddings and norms in
float32 the residual stream is float32, and so is all that checkpointing keeps of it. A base whose
weights were saved in half precision ran with a stream of half precision where it was made. Under a
run in bf16 its stream is bf16 here too: embeddings and norms give bf16, and what they are frozen in
is what its file has. fp16 is left alone, since activations of language models exceed its range, and
so is a base in float32.

Source: Sun et al. 2024, arXiv:2402.17762 (activations of some 10^4 in residual streams).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.models.devices import store_for_autocast, upcast_trainable

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rounding:
    """A forward hook: the output in another precision."""

    dtype: torch.dtype

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return output.to(self.dtype) if isinstance(output, Tensor) else output


@dataclass(frozen=True, kw_only=True)
class Precisions:
    """The precisions of a model as a run computes with it."""

    compute: torch.dtype
    """Of matrix products, by autocast unless it is float32."""
    between: torch.dtype
    """Of frozen embeddings and norms of the language model: float32, or what the file has where the
    residual stream is in half precision."""

    @classmethod
    def of(cls, language: nn.Module, compute_dtype: torch.dtype) -> Precisions:
        """Choose them.

        Args:
            language: the language model, its weights as they were read.
            compute_dtype: of matrix products.
        """
        kept = next((m.weight.dtype for m in _between(language)), torch.float32)
        halved = compute_dtype == torch.bfloat16 and kept in _HALF
        return cls(compute=compute_dtype, between=kept if halved else torch.float32)

    @property
    def halves_stream(self) -> bool:
        """Whether the residual stream is in `compute` rather than float32."""
        return self.between != torch.float32

    def store(self, model: nn.Module, language: nn.Module) -> None:
        """Bring the weights of a model to them; what trains is float32.

        Args:
            model: on the CPU, as it was read or copied.
            language: its language model.
        """
        between = list(_between(language)) if self.halves_stream else []
        upcast_trainable(model, besides=between)
        for module in between:
            if not module.weight.requires_grad:
                module.to(self.between)
        store_for_autocast(model, self.compute)

    def of_frozen(self, language: nn.Module) -> dict[int, torch.dtype]:
        """The precision of frozen embeddings and norms by the identity of the parameter; empty
        where it is float32."""
        between = _between(language) if self.halves_stream else ()
        return {
            id(parameter): self.between
            for module in between
            for parameter in module.parameters(recurse=False)
            if not parameter.requires_grad
        }

    def round_stream(self, language: nn.Module) -> None:
        """Have embeddings and norms give the precision of the stream from now on."""
        for module in _between(language) if self.halves_stream else ():
            module.register_forward_hook(Rounding(self.compute))


def _between(language: nn.Module) -> Iterator[Any]:
    """Embeddings and norms with weights, embeddings first."""
    modules = list(language.modules())
    yield from (module for module in modules if isinstance(module, nn.Embedding))
    for module in modules:
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter):
            yield module
