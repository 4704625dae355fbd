"""A family without quirks of its own."""

from __future__ import annotations

from diffalign.models.vlm.quirks.base import AbstractFamily


class Plain(AbstractFamily):
    """What a family does of which nothing else is known."""

    @property
    def name(self) -> str:
        return str(type(self.config).model_type)
