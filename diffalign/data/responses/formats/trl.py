"""TRL's vision preferences: images, a prompt and two responses, as text or as messages.

`images` (a list) or `image`; `prompt`, `chosen` and `rejected` are strings or lists of messages
`{role, content}`, whose content is text or blocks `{type: image}` and `{type: text, text}`. The
prompt may be called `messages`, as in LLaMA-Factory's OpenAI form. Without it, each of the two
conversations says what it answers: they share their beginning as a rule, and where they do not,
each response is trained under its own. HuggingFaceH4/rlaif-v_formatted has this form.

Source: https://huggingface.co/docs/trl/dataset_formats, "Preference" and "Vision datasets".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffalign.data.responses.conversation import Comparison, compared, turns_of
from diffalign.data.responses.formats.base import AbstractMapping


class TRL(AbstractMapping):
    """`prompt`, `chosen`, `rejected`, and `images` or `image`, or conversations alone."""

    needs: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected"})
    images_optional: ClassVar[bool] = True
    summary: ClassVar[str] = "prompt from prompt or the shared beginning of chosen and rejected"

    def recognises(self, first: Mapping[str, Any]) -> bool:
        asked = "prompt" in first or "messages" in first
        return asked or isinstance(first["chosen"], (list, Mapping))

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        sides = {side: values[side] for side in TRL.responses}
        asked = turns_of(values.get("prompt") or values.get("messages"))
        if not values.get("prompt") and asked[-1:] and asked[-1].role == "assistant":
            asked = ()  # the conversation of one of the responses
        said = any(turn.text for turn in asked)
        implied = not said and not isinstance(values["chosen"], str)
        return [compared(None if implied else asked, sides)]
