"""MIA-DPO: a question about one of several images, a true response and a mistaken one.

Fields are those of the authors' JSON lists: `id`, `image` (a list of file names), `prompt` (with a
marker an image), `chosen`, `rejected`, and `gt`, which is not read.

Source: Liu et al. 2024, arXiv:2410.17637; Liuziyu77/MIA-DPO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffalign.data.responses.conversation import Comparison, compared, turns_of
from diffalign.data.responses.formats.base import AbstractMapping


class MIADPO(AbstractMapping):
    """`image` with a list in it, `prompt`, `chosen`, `rejected`."""

    needs: ClassVar[frozenset[str]] = frozenset({"image", "prompt", "chosen", "rejected"})
    image_columns: ClassVar[tuple[str, ...]] = ("image",)
    summary: ClassVar[str] = "prompt from prompt"

    def recognises(self, first: Mapping[str, Any]) -> bool:
        return isinstance(first["image"], list)

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        sides = {side: values[side] for side in self.responses}
        return [compared(turns_of(values["prompt"]), sides)]
