"""POVID: a conversation as LLaVA's data have it, and the same one with a hallucination put in.

Fields are those of POVID's JSON list: `id`, `image` (a file name under COCO's train2014),
`conversations` ([{from, value}, ...]) and `rejected_conversations` (the same, with another
response).

Source: Zhou et al. 2024, arXiv:2402.11411.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffalign.data.responses.conversation import Comparison, compared
from diffalign.data.responses.formats.base import AbstractMapping


class POVID(AbstractMapping):
    """`image`, `conversations`, `rejected_conversations`."""

    needs: ClassVar[frozenset[str]] = frozenset({"conversations", "rejected_conversations"})
    image_columns: ClassVar[tuple[str, ...]] = ("image", "images")
    summary: ClassVar[str] = (
        "prompt and chosen from conversations, rejected from the end of rejected_conversations"
    )

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        sides = {
            "chosen": values["conversations"] or [],
            "rejected": values["rejected_conversations"] or [],
        }
        return [compared(None, sides)]
