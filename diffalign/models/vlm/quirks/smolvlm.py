"""SmolVLM: image features are brought to the precision of its first weight, and put among the
embeddings of text, which have another where the base is kept in half precision."""

from __future__ import annotations

from typing import Any

from diffalign.models.vlm.quirks.base import AbstractFamily


class SmolVLM(AbstractFamily):
    """SmolVLM, the second one too."""

    @property
    def name(self) -> str:
        return "SmolVLM"

    def repaired(self, model: Any) -> Any:
        """Let its precision be that of its embeddings; products are autocast anyway."""
        kind = type(model.model)
        of_text = property(lambda body: body.get_input_embeddings().weight.dtype)
        own = {"dtype": of_text, "__module__": kind.__module__}
        model.model.__class__ = type(kind.__name__, (kind,), own)
        return model
