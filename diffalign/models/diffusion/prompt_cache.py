"""Prompts that are met again and again, encoded once each."""

from __future__ import annotations

from collections import OrderedDict

import torch

from diffalign.models.diffusion.conditioning import AbstractConditioner, PromptEmbeddings


class PromptCache:
    """Encodings of single prompts, the most recently used ones kept on the device.

    Every prompt is encoded alone, so that its row does not depend on the company that it was first
    met in, not even in the last bit.
    """

    def __init__(self, conditioner: AbstractConditioner, *, capacity: int) -> None:
        """Start empty.

        Args:
            conditioner: around frozen text encoders.
            capacity: prompts that are kept; one of SDXL takes 0.6 MB in float32.
        """
        self._conditioner = conditioner
        self._capacity = capacity
        self._kept: OrderedDict[str, PromptEmbeddings] = OrderedDict()
        self._unconditional: PromptEmbeddings | None = None

    @torch.no_grad()
    def encode(self, prompt: str) -> PromptEmbeddings:
        """One row."""
        if prompt not in self._kept:
            self._kept[prompt] = self._conditioner.encode([prompt])
        self._kept.move_to_end(prompt)
        if len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return self._kept[prompt]

    @torch.no_grad()
    def unconditional(self) -> PromptEmbeddings:
        """The one row that guidance steers away from."""
        if self._unconditional is None:
            self._unconditional = self._conditioner.unconditional()
        return self._unconditional
