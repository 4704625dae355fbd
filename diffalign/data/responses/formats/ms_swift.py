"""ms-swift: a conversation with its response, another response, and perhaps other images for that
one.

Fields: `messages` ([{role, content}, ...], ending with the preferred response), `images` (a list),
`rejected_response` (text) or `rejected_messages` (a whole conversation), and `rejected_images`,
which the rejected response is about; the chosen one can be seen next to them too, under the
condition `rejected`. With images of its own, the rejected response may be the same text; where it
is absent, it is.

Source: https://swift.readthedocs.io, "Custom Dataset", DPO/ORPO/CPO/SimPO/RM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffalign.data.responses.conversation import Comparison, compared
from diffalign.data.responses.formats.base import AbstractMapping

_OTHERS = ("rejected_response", "rejected_messages", "rejected_images")


class MSSwift(AbstractMapping):
    """`messages`, `images`, and a response, messages or images that are rejected."""

    needs: ClassVar[frozenset[str]] = frozenset({"messages"})
    images_optional: ClassVar[bool] = True
    replacements: ClassVar[Mapping[str, str]] = {"rejected": "rejected_images"}
    own_images: ClassVar[Mapping[str, str]] = {"rejected": "rejected_images"}
    summary: ClassVar[str] = (
        "prompt and chosen from messages, rejected from rejected_response or rejected_messages"
    )

    def recognises(self, first: Mapping[str, Any]) -> bool:
        return any(name in first for name in _OTHERS)

    def describe_needs(self) -> str:
        return f"{super().describe_needs()} with {' or '.join(_OTHERS)}"

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        messages = values["messages"] or []
        others = (values.get(name) for name in _OTHERS[:2])
        rejected = next((other for other in others if other is not None), messages)
        return [compared(None, {"chosen": messages, "rejected": rejected})]
