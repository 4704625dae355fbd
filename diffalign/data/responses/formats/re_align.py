"""Re-Align: two conversations that differ in the response, an image, and a similar one retrieved.

Fields are those of the authors' JSON list: `image`, `retrieved_image` (file names), `chosen` and
`rejected` ([{role, content}, ...]). The retrieved image is offered under the condition `retrieved`.

Source: Xing et al. 2025, arXiv:2502.13146; taco-group/Re-Align, train_rdpo.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffalign.data.responses.conversation import (
    Comparison,
    compared,
    split_response,
    turns_of,
)
from diffalign.data.responses.formats.base import AbstractMapping


class ReAlign(AbstractMapping):
    """`image`, `retrieved_image`, `chosen`, `rejected`."""

    needs: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected", "retrieved_image"})
    image_columns: ClassVar[tuple[str, ...]] = ("image", "images")
    replacements: ClassVar[Mapping[str, str]] = {"retrieved": "retrieved_image"}
    summary: ClassVar[str] = (
        "prompt from the beginning of chosen, images under the condition retrieved from "
        "retrieved_image"
    )

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        before, _ = split_response(turns_of(values["chosen"]), "chosen")
        asked = None if before or values.get("prompt") is None else turns_of(values["prompt"])
        return [compared(asked, {side: values[side] for side in self.responses})]
