"""LLaMA-Factory's alpaca preferences: an instruction, perhaps its input, and two responses.

Fields: `instruction`, `input` (appended on a new line), `chosen`, `rejected`, and perhaps `system`,
`history` ([[question, response], ...], earlier rounds) and `images`.

Source: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md, "Alpaca Format".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffalign.data.responses.conversation import Comparison, compared, instruction_turns
from diffalign.data.responses.formats.base import AbstractMapping


class Alpaca(AbstractMapping):
    """`instruction`, `chosen`, `rejected`, and perhaps `input`, `system`, `history`."""

    needs: ClassVar[frozenset[str]] = frozenset({"instruction", "chosen", "rejected"})
    images_optional: ClassVar[bool] = True
    summary: ClassVar[str] = "prompt from system, history, instruction and input"

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        return [
            compared(instruction_turns(values), {side: values[side] for side in self.responses})
        ]
