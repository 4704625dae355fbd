"""InternVL: what its projector takes for the tower's last layer is the output, after its norm."""

from __future__ import annotations

from diffalign.models.vlm.quirks.base import AbstractFamily

_LAST = -1


class InternVL(AbstractFamily):
    """InternVL 3 as transformers has it."""

    @property
    def name(self) -> str:
        return "InternVL3"

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in super().layers if layer != _LAST)
