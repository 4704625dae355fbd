"""LLaMA-Factory's sharegpt preferences: a conversation, and two messages that could follow it.

Fields: `conversations` ([{from, value}, ...], ending with the user), `chosen` and `rejected` (one
message each), `images` (a list of files), and perhaps `system`.

Source: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md, "Preference Dataset".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffalign.data.responses.conversation import Comparison, compared, system_turn, turns_of
from diffalign.data.responses.formats.base import AbstractMapping


class ShareGPT(AbstractMapping):
    """`conversations`, `chosen`, `rejected`, `images`."""

    needs: ClassVar[frozenset[str]] = frozenset({"conversations", "chosen", "rejected"})
    images_optional: ClassVar[bool] = True
    summary: ClassVar[str] = "prompt from conversations and system"

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        turns = (*system_turn(values.get("system")), *turns_of(values["conversations"]))
        return [compared(turns, {side: values[side] for side in self.responses})]
