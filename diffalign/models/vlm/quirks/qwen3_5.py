"""Qwen3.5: most layers attend linearly, by projections of other names."""

from __future__ import annotations

from diffalign.models.vlm.quirks.base import AbstractFamily


class Qwen35(AbstractFamily):
    """Qwen3.5."""

    further_targets = ("in_proj_qkv", "in_proj_z", "out_proj")

    @property
    def name(self) -> str:
        return "Qwen3.5"
