"""Llama 4: layers without positions scale attention by where a token is in the row, which in a row
with branches is not where it is in its response; the scale is 1 for the first tokens."""

from __future__ import annotations

from typing import Any

from diffalign.models.vlm.quirks.base import AbstractFamily


class Llama4(AbstractFamily):
    """Llama 4."""

    @property
    def name(self) -> str:
        return "Llama 4"

    @property
    def longest_branched(self) -> int | None:
        scaled = getattr(self.text, "attn_temperature_tuning", False)
        return int(self.text.floor_scale) - 1 if scaled else None

    def repaired(self, model: Any) -> Any:
        """In transformers 5.24 its forward asks its language model for an output about images,
        which that does not have."""

        def complete(module: Any, inputs: Any, output: Any) -> None:
            if not hasattr(output, "image_outputs"):
                output.image_outputs = None

        model.language_model.register_forward_hook(complete)
        return model
