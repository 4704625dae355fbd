"""Gemma 3: the tokens of an image see each other, in layers with a window within it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffalign.models.vlm.quirks.base import AbstractFamily


class Gemma3(AbstractFamily):
    """Gemma 3."""

    sees_ahead = True

    @property
    def name(self) -> str:
        return "Gemma 3"

    def blocks(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        types = inputs.get("token_type_ids")
        if types is None:
            return None
        of_image = types == 1
        first = of_image.clone()
        first[:, 1:] &= ~of_image[:, :-1]
        return torch.where(of_image, first.long().cumsum(dim=1) - 1, -1)
