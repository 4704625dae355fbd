"""Single responses without a label, all of them to be imitated: what SFT trains on.

TRL has `prompt` and `completion`, or `messages` alone; LLaVA `conversations` and `image`; alpaca
`instruction`, `input` and `output`. The last message is the response, and those before it are what
it answers.

Sources: https://huggingface.co/docs/trl/dataset_formats, "Prompt-completion" and "Language
modeling"; https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from diffalign.data.responses.conversation import (
    Comparison,
    compared,
    instruction_turns,
    malformed,
    system_turn,
    turns_of,
)
from diffalign.data.responses.formats.base import AbstractMapping

_CONVERSATIONS = ("messages", "conversations")
_OTHERS = frozenset({"chosen", "rejected", "completions", "chosen_item", "rejected_item"})
_REJECTED = ("rejected_response", "rejected_messages", "rejected_images", "rejected_conversations")
_WRITTEN = ({"prompt", "completion"}, {"instruction", "output"})
_LABELS = frozenset({"label", "kto_tag"})


class Demonstrations(AbstractMapping):
    """`prompt` and `completion`, `instruction` and `output`, or `messages` or `conversations`."""

    needs: ClassVar[frozenset[str]] = frozenset()
    images_optional: ClassVar[bool] = True
    paired: ClassVar[bool] = False
    responses: ClassVar[tuple[str, ...]] = ("chosen",)
    summary: ClassVar[str] = "the last response of each row, none of them labelled"

    def recognises(self, first: Mapping[str, Any]) -> bool:
        return shows_one_response(first) and not _LABELS & set(first)

    def describe_needs(self) -> str:
        return (
            "prompt and completion, or messages, or conversations, or instruction and output; and "
            "perhaps images (or image)"
        )

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        return [demonstrated(values, "chosen")]


def shows_one_response(columns: Mapping[str, Any]) -> bool:
    """Whether rows of these columns hold one response each, and none that it competes with."""
    alone = not _OTHERS & set(columns) and not any(name in columns for name in _REJECTED)
    said = any(name in columns for name in _CONVERSATIONS)
    written = any(pair <= set(columns) for pair in _WRITTEN)
    return alone and (said or written)


def demonstrated(values: Mapping[str, Any], side: str) -> Comparison:
    """The response of a row, and what it responds to.

    Args:
        values: column -> value.
        side: what the response is called.

    Raises:
        UnusableRowError: there is none.
    """
    whole = next((values[name] for name in _CONVERSATIONS if values.get(name)), None)
    if whole is not None:
        found = compared(None, {side: whole})
    elif values.get("completion") is not None:
        prompt, completion = values.get("prompt"), values["completion"]
        implied = not prompt and not isinstance(completion, str)
        found = compared(None if implied else turns_of(prompt), {side: completion})
    elif values.get("output") is not None:
        return compared(instruction_turns(values), {side: values["output"]})
    else:
        raise malformed("there is neither a completion nor a conversation that ends with one")
    if found.turns[0].role == "system":
        return found
    return replace(found, turns=(*system_turn(values.get("system")), *found.turns))
