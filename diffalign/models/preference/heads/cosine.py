"""The encoder's own score: CLIP's cosine times its scale, as PickScore has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from diffalign.models.preference.heads.base import AbstractHead, Features


@dataclass(frozen=True, kw_only=True)
class Cosine(AbstractHead):
    """No weights of its own: what trains are the towers."""

    needs_plain: ClassVar[bool] = True

    def build(self, width: int) -> nn.Module:
        return _Plain()

    def describe(self) -> str:
        return "the cosine of image and prompt"


class _Plain(nn.Module):
    def forward(self, features: Features, users: Tensor | None) -> Tensor:
        assert features.plain is not None, "it was checked"
        return features.plain
